"""Words a small pretrained model proposes: whole, other, and the same in any batch."""

import json
import pathlib
import re

import numpy as np
import pytest
import small_store

from albert_jax import config
from albert_jax.data import augmentation as words_lib
from albert_jax.errors import UserError
from albert_jax.tasks import augmentation, paraphrase

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TEXTS = small_store.sentences(1, 60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("paraphrase")
    with pytest.MonkeyPatch.context() as patch:
        # For one device and without optimisation it is compiled sooner.
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        return _trained(folder)


def _trained(folder: pathlib.Path) -> pathlib.Path:
    text = "\n\n".join("\n".join(small_store.sentences(seed, 30)) for seed in range(40))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    small_store.run_command(
        "prepare",
        f"--input={folder / 'text.txt'}",
        f"--output={folder / 'store'}",
        "--train_tokenizer=wordpiece",
        "--vocab_size=140",  # whole words are pieces
        "--validation_fraction=0.2",
        "--workers=1",
    )
    small_store.run_command(
        "train",
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        f"--workdir={folder / 'run'}",
        f"--config.data.path={folder / 'store'}",
        "--config.model.hidden_size=32",
        "--config.model.embedding_size=16",
        "--config.model.num_hidden_layers=1",
        "--config.model.intermediate_size=64",
        "--config.model.num_attention_heads=2",
        "--config.model.dtype=float32",
        "--config.data.max_seq_length=64",
        "--config.data.max_predictions_per_seq=10",
        "--config.train.steps=10",
        "--config.train.global_batch_size=16",
        "--config.optimizer.warmup_steps=4",
        "--config.eval.steps=1",
    )
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    return paraphrase.load(run)


def _draws(seed: int, count: int) -> list[np.random.Generator]:
    return [words_lib.generator(seed, row, 0) for row in range(count)]


def _words(text: str) -> list[str]:
    return [text[begin:end] for begin, end in words_lib.words(text)]


def test_whole_words_are_replaced_by_other_words_at_the_rate(model):
    changed = model.replaced(TEXTS, 0.3, _draws(0, len(TEXTS)))
    old, new = [_words(text) for text in TEXTS], [_words(text) for text in changed]
    assert list(map(len, old)) == list(map(len, new))
    # What stands between words is as it was.
    between = re.compile(r"[A-Za-z]+")
    assert [between.sub("", t) for t in TEXTS] == [between.sub("", t) for t in changed]
    pairs = [pair for a, b in zip(old, new, strict=True) for pair in zip(a, b, strict=True)]
    replaced = [(a, b) for a, b in pairs if a != b]
    assert len(replaced) / len(pairs) == pytest.approx(0.3, abs=0.05)
    assert all(a.lower() != b.lower() for a, b in replaced)
    assert all(a[0].isupper() == b[0].isupper() for a, b in pairs)
    pieces = {model.tokenizer.readable(piece) for piece in np.flatnonzero(model._whole_words)}
    assert all(b.lower() in pieces for _, b in replaced)


def test_a_text_depends_on_its_own_draw_alone(model):
    whole = model.replaced(TEXTS, 0.3, _draws(0, len(TEXTS)))
    assert whole == model.replaced(TEXTS, 0.3, _draws(0, len(TEXTS)))
    assert whole != model.replaced(TEXTS, 0.3, _draws(1, len(TEXTS)))
    assert whole[7:9] == model.replaced(TEXTS[7:9], 0.3, _draws(0, 9)[7:])


def test_brackets_numbers_and_the_end_of_a_long_text_stay(model):
    long = " ".join(TEXTS)
    (changed,) = model.replaced([long], 0.5, _draws(0, 1))
    assert changed != long
    assert changed[-200:] == long[-200:]
    kept = ["[The cat] 3D 1st", "", "42", "?!"]
    assert model.replaced(kept, 0.9, _draws(0, 4)) == kept


def test_labels_of_pairs_go_with_their_copies(run):
    rows = [(TEXTS[row], TEXTS[row + 30]) for row in range(30)]
    options = config.AugmentationConfig(model=str(run), rate=0.2, copies=2)
    found = augmentation.augment_texts(rows, options)
    assert found == augmentation.augment_texts(rows, options)
    assert len(found) > 50
    assert len(set(found)) == len(found)
    for row, segments in found:
        assert segments != rows[row]
        assert len(segments) == 2
        same = [len(_words(a)) == len(_words(b)) for a, b in zip(segments, rows[row], strict=True)]
        assert all(same)


def test_a_fine_tuning_proposes_nothing(run, tmp_path):
    values = json.loads((run / "config.json").read_text())
    values["task"]["name"] = "cola"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="predicts no masked words"):
        paraphrase.load(tmp_path)
