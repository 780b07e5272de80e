"""Figures against their formulas in NumPy, and pictures that can be looked at."""

import warnings

import numpy as np
import pytest
from matplotlib import image
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2, IOBES

from albert_jax.tasks import metrics

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _f1(labels, predictions):
    both = np.sum(labels & predictions)
    return 2 * both / (labels.sum() + predictions.sum())


def test_two_classes_equal_their_formulas():
    labels, predictions = RNG.integers(0, 2, 300), RNG.integers(0, 2, 300)
    positive = _f1(labels == 1, predictions == 1)
    found = metrics.accuracy_and_f1(labels, predictions)
    assert found["f1"] == pytest.approx(positive, abs=1e-9)
    assert found["accuracy"] == pytest.approx(sum(labels == predictions) / 300, abs=1e-9)
    swapped = metrics.accuracy_and_f1(1 - labels, 1 - predictions, positive=0)
    assert swapped["f1"] == pytest.approx(positive, abs=1e-9)

    tp, tn = np.sum(labels & predictions), np.sum((1 - labels) & (1 - predictions))
    fp, fn = np.sum((1 - labels) & predictions), np.sum(labels & (1 - predictions))
    matthews = (tp * tn - fp * fn) / np.sqrt(
        float(tp + fp) * float(tp + fn) * float(tn + fp) * float(tn + fn)
    )
    found = metrics.accuracy_and_matthews(labels, predictions)
    assert found["matthews"] == pytest.approx(matthews, abs=1e-9)


def test_macro_f1_is_the_mean_of_the_classes_that_occur():
    labels, predictions = RNG.integers(0, 4, 300), RNG.integers(1, 5, 300)
    each = [_f1(labels == k, predictions == k) for k in range(5)]
    found = metrics.accuracy_and_macro_f1(labels, predictions)
    assert found["f1_macro"] == pytest.approx(np.mean(each), abs=1e-9)


def test_several_labels_equal_their_formulas():
    labels, predictions = RNG.random((200, 6)) < 0.3, RNG.random((200, 6)) < 0.4
    labels[:, 5] = predictions[:, 5] = False  # a class nobody has seen says nothing
    found = metrics.multi_label(labels, predictions)
    assert found["f1_micro"] == pytest.approx(_f1(labels, predictions), abs=1e-9)
    each = [_f1(labels[:, k], predictions[:, k]) for k in range(5)]
    assert found["f1_macro"] == pytest.approx(np.mean(each), abs=1e-9)
    assert found["exact"] == pytest.approx(np.mean([*map(np.array_equal, labels, predictions)]))
    assert set(metrics.multi_label(labels, labels).values()) == {1.0}
    nothing = np.zeros((3, 2), bool)
    assert set(metrics.multi_label(nothing, nothing).values()) == {1.0}


def _ranks(values):
    return np.array([np.mean(np.flatnonzero(np.sort(values) == value)) for value in values])


def test_correlations_and_regression_equal_their_formulas():
    labels = np.round(RNG.random(200) * 5, 1)  # with ties
    predictions = np.round(labels + RNG.normal(size=200), 1)
    found = metrics.correlations(labels, predictions)
    pearson = np.corrcoef(labels, predictions)[0, 1]
    spearman = np.corrcoef(_ranks(labels), _ranks(predictions))[0, 1]
    assert found["pearson"] == pytest.approx(pearson, abs=1e-9)
    assert found["spearman"] == pytest.approx(spearman, abs=1e-9)
    found = metrics.regression(labels, predictions)
    apart = np.sum((labels - predictions) ** 2) / np.sum((labels - labels.mean()) ** 2)
    assert found["r2"] == pytest.approx(1 - apart, abs=1e-9)
    assert found["mae"] == pytest.approx(np.mean(np.abs(labels - predictions)), abs=1e-9)


def test_constant_predictions_have_no_correlation_and_warn_nobody():
    constant, labels = np.full(9, 2.5, np.float32), np.arange(9.0)
    assert metrics.correlations(labels, constant) == {"pearson": 0.0, "spearman": 0.0}
    assert metrics.correlations(constant, labels) == {"pearson": 0.0, "spearman": 0.0}
    zeros, ones = np.zeros(9, int), np.arange(9) % 2
    assert metrics.accuracy_and_matthews(ones, zeros)["matthews"] == 0.0
    assert metrics.accuracy_and_f1(ones, zeros)["f1"] == 0.0
    assert metrics.accuracy_and_macro_f1(ones, zeros)["f1_macro"] == pytest.approx(5 / 14)
    assert np.isfinite(metrics.regression(constant, labels)["r2"])
    assert metrics.regression(labels[:1], labels[:1])["mae"] == 0.0
    assert metrics.entities([["O"]], [["O"]])["f1"] == 0.0
    assert metrics.entities([["B-A"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def _entities(tags):
    """Entities of IOB2 tags, strictly: (type, begin, end)."""
    found, begin = set(), None
    for place, tag in enumerate([*tags, "O"]):
        if begin is not None and tag != f"I-{tags[begin][2:]}":
            found.add((tags[begin][2:], begin, place))
            begin = None
        if tag[0] == "B":
            begin = place
    return found


@pytest.mark.parametrize(
    ("name", "scheme", "prefixes"), [("IOB2", IOB2, "BI"), ("IOBES", IOBES, "BIES")]
)
def test_entities_are_counted_as_seqeval_does_in_strict_mode(name, scheme, prefixes):
    tags = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in ("PER", "LOC"))]
    labels = [list(RNG.choice(tags, 12)) for _ in range(200)]
    predictions = [
        [tag if RNG.random() < 0.7 else RNG.choice(tags) for tag in sentence] for sentence in labels
    ]
    found = metrics.entities(labels, predictions, name)
    assert found["f1"] == pytest.approx(
        f1_score(labels, predictions, mode="strict", scheme=scheme), abs=1e-9
    )
    assert 0 < found["f1"] < 1
    if name == "IOB2":
        pairs = [(_entities(a), _entities(b)) for a, b in zip(labels, predictions, strict=True)]
        right = sum(len(a & b) for a, b in pairs)
        assert found["recall"] == pytest.approx(right / sum(len(a) for a, _ in pairs), abs=1e-9)
        assert found["precision"] == pytest.approx(right / sum(len(b) for _, b in pairs), abs=1e-9)


def test_an_entity_with_one_wrong_end_is_wrong():
    true = [["B-PER", "I-PER", "O", "B-LOC"]]
    assert metrics.entities(true, [["B-PER", "O", "O", "B-LOC"]])["f1"] == 0.5
    assert metrics.entities(true, [["I-PER", "I-PER", "O", "B-LOC"]])["precision"] == 1.0
    assert metrics.entities(true, true) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}


def test_pictures_are_drawn(tmp_path):
    labels, names = (
        RNG.integers(0, 40, 2000),
        [f"class {k} costs $5 and more {k}" for k in range(40)],
    )
    metrics.draw_confusion(tmp_path / "new" / "large.png", labels, labels, names)
    metrics.draw_confusion(tmp_path / "small.png", labels[:5] % 2, labels[:5] % 2, ["a", "b"])
    metrics.draw_scatter(tmp_path / "scatter.png", labels, labels + RNG.normal(size=2000))
    large, small = (image.imread(tmp_path / path) for path in ("new/large.png", "small.png"))
    assert min(large.shape[:2]) > 1500
    assert max(small.shape[:2]) < 1000
    assert np.ptp(image.imread(tmp_path / "scatter.png")[..., :3]) > 0.5
