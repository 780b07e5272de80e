"""Texts and pairs of texts to features; scores to classes, numbers or several labels at once.

In:  `Example`s, read by a task's own module (`glue`, `xnli`, `table`).
Out: `Split`s, and files of predictions that name each row by its key.

Letters: R rows, K labels.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from albert_jax.config import AugmentationConfig
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import augmentation, metrics, task
from albert_jax.tasks.task import Features, Outputs, Split

HEAD = "sequence_classification"
# Labels and predictions, both as `predicted` gives them, to figures by name.
Figures = Callable[[np.ndarray, np.ndarray], dict[str, float]]


class Example(NamedTuple):
    """A row.

    Attributes:
        key: what it is called in files of predictions: an index, or a line of its file.
        first, second: the text, and the one beside it or None.
        label: a class's place among the names, a number, or bool [K]; None: not known.
    """

    key: str
    first: str
    second: str | None
    label: Any


class Kind(NamedTuple):
    """What is predicted of a text.

    Attributes:
        name: one of `config.TABLE_KINDS`.
        labels: K names of the classes; one for a number.
        figures: how predictions are scored.
    """

    name: str
    labels: tuple[str, ...]
    figures: Figures


def featurise(
    examples: Sequence[Example],
    kind: Kind,
    tokenizer: Tokenizer,
    longest: int,
    changed: AugmentationConfig | None = None,
) -> tuple[Features, int]:
    """Rows of pieces with targets, and how many rows were cut to fit.

    Args:
        examples: R rows, all of one text or all of two.
        kind: gives the shape of the targets; what is not known plays no part in the loss.
        tokenizer: makes the pieces.
        longest: pieces of a row, special ones included; of two texts the longer one is cut first.
        changed: of rows to learn from, how copies of them are changed (`augmented`); the copies
            stand behind the rows.
    """
    if changed is not None:
        examples = [*examples, *augmented(examples, changed)]
    paired = bool(examples) and examples[0].second is not None
    first, first_at = tokenizer.encode_batch([example.first for example in examples])
    second, second_at = tokenizer.encode_batch(
        [example.second or "" for example in examples] if paired else []
    )
    room = longest - task.special_pieces(tokenizer, paired)
    cut = 0
    sequences: list[tuple[list[int], list[int]]] = []
    for row in range(len(examples)):
        ids = first[first_at[row] : first_at[row + 1]].tolist()
        more = second[second_at[row] : second_at[row + 1]].tolist() if paired else []
        cut += task.truncate_pair(ids, more, room)
        sequences.append(task.join(tokenizer, ids, more if paired else None))
    return task.features(sequences, targets={"labels": _targets(examples, kind)}), cut


def augmented(examples: Sequence[Example], options: AugmentationConfig) -> list[Example]:
    """Changed copies of rows, each with its row's key and label; none where none are asked for.

    Raises:
        UserError: a source of changes that cannot be read, or that changes nothing.
    """
    if not augmentation.is_asked(options):
        return []
    texts = [tuple(t for t in (one.first, one.second) if t is not None) for one in examples]
    found = augmentation.augment_texts(texts, options)
    if not found:
        raise UserError(
            f"augmentation: none of {len(texts):,} rows is changed by "
            f"synonyms={options.synonyms!r}, paraphrases={options.paraphrases!r}, "
            f"model={options.model!r} at rate={options.rate}; are they of the rows' language?"
        )
    return [
        examples[row]._replace(first=segments[0], second=segments[1] if segments[1:] else None)
        for row, segments in found
    ]


def note(name: str, features: Features, cut: int, longest: int) -> str:
    """A line on a split for a person: how many rows, and the share that was cut."""
    line = f"{name}: {len(features):,} rows"
    if cut:
        share = cut / len(features)
        line += f", {cut:,} ({share:.1%}) longer than data.max_seq_length={longest} and cut"
    return line


def split(
    name: str,
    examples: Sequence[Example],
    kind: Kind,
    features: Features,
    write_more: Callable[[Outputs, pathlib.Path], list[pathlib.Path]] | None = None,
) -> Split:
    """A split that is scored where every row has a label, and writes `predictions_NAME.tsv`.

    Args:
        name: what it is called.
        examples: its R rows.
        kind: what is predicted.
        features: what `featurise` made of them.
        write_more: writes files of the task's own besides.
    """
    labels = gold(examples)

    def score(outputs: Outputs) -> dict[str, float]:
        return kind.figures(labels, predicted(outputs, kind))

    def write(outputs: Outputs, folder: pathlib.Path) -> list[pathlib.Path]:
        path = folder / f"predictions_{name}.tsv"
        write_predictions(path, [example.key for example in examples], kind, outputs, labels)
        return [path, *(write_more(outputs, folder) if write_more else [])]

    return Split(name, features, None if labels is None else score, write)


def gold(examples: Sequence[Example]) -> Any:
    """Labels of all rows: int [R], float [R] or bool [R, K]; None where one is not known."""
    labels = [example.label for example in examples]
    return None if any(label is None for label in labels) else np.asarray(labels)


def scores(outputs: Outputs) -> np.ndarray:
    """The head's scores, float32 [R, K]."""
    return np.stack([np.asarray(row, np.float32).reshape(-1) for row in outputs["logits"]])


def predicted(outputs: Outputs, kind: Kind) -> np.ndarray:
    """Classes int [R], numbers float [R], or decisions bool [R, K]."""
    if kind.name == "regression":
        return scores(outputs)[:, 0]
    return scores(outputs) > 0 if kind.name == "multi_label" else scores(outputs).argmax(axis=1)


def write_predictions(
    path: pathlib.Path, keys: Sequence[str], kind: Kind, outputs: Outputs, labels: Any = None
) -> None:
    """Writes a row a line between tabs, under a header: key, prediction, label where known, and the
    probability of each class.

    Args:
        path: the file to write; its folder is made.
        keys: R names.
        kind: what is predicted.
        outputs: scores of R rows.
        labels: as `gold` gives them.
    """
    predictions = predicted(outputs, kind)
    if kind.name == "regression":
        probabilities, names = np.zeros((len(keys), 0)), ()
    else:
        squash = special.expit if kind.name == "multi_label" else special.softmax
        axis = {} if kind.name == "multi_label" else {"axis": 1}
        probabilities, names = squash(scores(outputs).astype(np.float64), **axis), kind.labels
    header = ["row", "prediction", *(["label"] if labels is not None else []), *names]
    table = [header]
    for row, key in enumerate(keys):
        said = [readable(predictions[row], kind)]
        if labels is not None:
            said.append(readable(labels[row], kind))
        table.append([key, *said, *(f"{value:.6f}" for value in probabilities[row])])
    write_tsv(path, table)


def readable(value: Any, kind: Kind) -> str:
    """A prediction or label as text: a class's name, several with `|` between, or a number."""
    if kind.name == "regression":
        return f"{value:.6g}"
    if kind.name == "multi_label":
        return "|".join(name for name, on in zip(kind.labels, value, strict=True) if on)
    return kind.labels[value]


def write_tsv(path: pathlib.Path, table: Sequence[Sequence[str]]) -> None:
    """Writes cells between tabs; white space inside a cell becomes one space, as nothing is
    quoted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ("\t".join(" ".join(cell.split()) for cell in row) + "\n" for row in table)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def drawing(examples: Sequence[Example], kind: Kind) -> Callable[[Outputs, pathlib.Path], None]:
    """What draws a labelled split's outputs: `confusion.png` of classes, `scatter.png` of numbers;
    nothing of several labels at once.
    """
    labels = gold(examples)

    def draw(outputs: Outputs, folder: pathlib.Path) -> None:
        found = predicted(outputs, kind)
        if kind.name == "classification":
            metrics.draw_confusion(folder / "confusion.png", labels, found, kind.labels)
        elif kind.name == "regression":
            metrics.draw_scatter(folder / "scatter.png", labels, found)

    return draw


def class_of(
    value: str,
    places: Mapping[str, int],
    problems: task.Problems,
    path: pathlib.Path,
    line: int,
) -> int | None:
    """The place of a class; None where there is no such class, which is counted."""
    place = places.get(value)
    if place is None:
        problems.add(f"label {value!r} that is none of the classes, left out", path, line)
    return place


def _targets(examples: Sequence[Example], kind: Kind) -> np.ndarray:
    rows = len(examples)
    if kind.name == "regression":
        return np.array(
            [np.nan if example.label is None else example.label for example in examples], np.float32
        )
    if kind.name == "multi_label":
        unknown = np.full(len(kind.labels), np.nan)
        found = [unknown if example.label is None else example.label for example in examples]
        return np.array(found, np.float32).reshape(rows, len(kind.labels))
    return np.array(
        [task.NOT_COUNTED if example.label is None else example.label for example in examples],
        np.int32,
    )
