"""Your own table: a text, or two, and what is to be said of it.

In:  CSV, TSV or JSON Lines; columns `task.text`, `task.text_pair` and `task.label`.
Out: a `Task` of one class a text, several labels at once, or a number, by `task.kind`.

Several labels stand in a cell with `|` between, or as a JSON list; an empty cell or list is a text
to which none applies. Where no validation file is named or there, a tenth of the training rows is
split off by a hash of their texts: always the same ones, and the same text never on both sides.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from albert_jax.config import Config, TaskConfig
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import classification, metrics, rows
from albert_jax.tasks.classification import Example, Kind
from albert_jax.tasks.task import Problems, Task

BETWEEN_LABELS = "|"
VALIDATION_PARTS = 10  # one in so many rows
_STEMS = {
    "train": ("train",),
    "validation": ("validation", "dev", "valid", "val"),
    "test": ("test",),
}
_FIGURES = {
    "classification": (metrics.accuracy_and_macro_f1, "accuracy"),
    "multi_label": (metrics.multi_label, "f1_micro"),
    "regression": (metrics.regression, "r2"),
}


class Record(NamedTuple):
    """A row as it was read: `label` is a name, a tuple of names or a number; None: not given."""

    key: str
    path: pathlib.Path
    line: int
    first: str
    second: str | None
    label: Any


def load(config: Config, tokenizer: Tokenizer, folder: pathlib.Path) -> Task:
    """A table of your own.

    Args:
        config: the run's; `task.train`, `validation` and `test` name files under `folder`, by
            default train, validation and test with `.tsv`, `.csv` or `.jsonl`.
        tokenizer: makes the pieces.
        folder: where the files are; or the one file.

    Raises:
        UserError: no such files or columns, no row that can be used, fewer than two classes.
    """
    of_task, longest = config.task, config.data.max_seq_length
    problems = Problems()
    if folder.is_file():
        folder, only = folder.parent, folder.name
    else:
        only = ""
    records: dict[str, list[Record]] = {}
    for name, stems in _STEMS.items():
        default = [f"{stem}{suffix}" for stem in stems for suffix in rows.SUFFIXES]
        named = getattr(of_task, name) or (only if name == "train" else "")
        paths = [] if only and not named else rows.files(folder, named, f"task.{name}", default)
        if name == "train" and not paths:
            raise rows.missing_train(folder, default)
        found = [
            record
            for path in paths
            for record in _read(path, of_task, problems, needs_label=name != "test")
        ]
        if paths and not found:
            raise rows.empty(", ".join(map(str, paths)), problems)
        if found:
            records[name] = found
    labels = _labels(of_task, records["train"])
    notes = (
        [f"classes ({len(labels)}): {', '.join(labels)}"] if of_task.kind != "regression" else []
    )
    if "validation" not in records:
        # Before the test, so that it is the split that decides.
        records = _with_validation(records, folder)
        share = f"1 in {VALIDATION_PARTS}"
        notes.append(f"no validation file: {share} training rows split off, by a hash of the text")

    figures, best_by = _FIGURES[of_task.kind]
    kind = Kind(of_task.kind, labels, figures)
    places = {label: place for place, label in enumerate(labels)}
    examples = {
        name: list(_examples(found, kind, places, problems)) for name, found in records.items()
    }
    featurised = {}
    for name, found in examples.items():
        if not found:
            raise rows.empty(records[name][0].path, problems)
        changed = config.augmentation if name == "train" else None
        featurised[name], cut = classification.featurise(found, kind, tokenizer, longest, changed)
        notes.append(classification.note(name, featurised[name], cut, longest))
    train = featurised.pop("train")
    return Task(
        head=classification.HEAD,
        labels=labels,
        train=train,
        splits=tuple(
            classification.split(name, examples[name], kind, features)
            for name, features in featurised.items()
        ),
        best_by=best_by,
        notes=(*notes, *problems.notes()),
        draw=classification.drawing(examples["validation"], kind),
    )


def _read(
    path: pathlib.Path, of_task: TaskConfig, problems: Problems, needs_label: bool
) -> Iterator[Record]:
    needed = {of_task.text: "task.text"}
    if of_task.text_pair:
        needed[of_task.text_pair] = "task.text_pair"
    if needs_label:
        needed[of_task.label] = "task.label"
    for line, row in rows.read(path, problems, needed):
        texts = [row.get(of_task.text)]
        if of_task.text_pair:
            texts.append(row.get(of_task.text_pair))
        if any(_is_missing(text) for text in texts):
            problems.add("row without a text, left out", path, line)
            continue
        label = None
        if needs_label or of_task.label in row:
            label = row.get(of_task.label)
            # Of several labels none may apply, so only what is not there at all is missing.
            if label is None or (of_task.kind != "multi_label" and _is_missing(label)):
                problems.add("row without a label, left out", path, line)
                continue
            label = _label(label, of_task.kind)
            if label is None:
                wanted = "number" if of_task.kind == "regression" else "list of labels"
                problems.add(f"label that is no {wanted}, left out", path, line)
                continue
        first, *more = map(str, texts)
        yield Record(str(line), path, line, first, more[0] if more else None, label)


def _is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: empty or white, JSON's null or NaN."""
    return value is None or value != value or not str(value).strip()


def _label(value: Any, kind: str) -> Any:
    """A name, a tuple of names, or a number; None where the cell holds no such thing."""
    if kind == "classification":
        return str(value).strip()
    if kind == "regression":
        try:
            number = float(value)
        except (TypeError, ValueError):
            return None
        return number if math.isfinite(number) else None
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, dict):
        return None
    names = value if isinstance(value, list) else str(value).split(BETWEEN_LABELS)
    return tuple(name for name in (str(name).strip() for name in names) if name)


def _labels(of_task: TaskConfig, train: Sequence[Record]) -> tuple[str, ...]:
    """Names of the classes: those the config gives, else those in train, sorted."""
    if of_task.kind == "regression":
        return (of_task.label,)
    if of_task.label_names:
        return of_task.label_names
    found = {record.label for record in train}
    if of_task.kind == "multi_label":
        found = {name for names in found for name in names}
    least = 1 if of_task.kind == "multi_label" else 2
    if len(found) < least:
        raise UserError(
            f"{train[0].path}: column {of_task.label!r} (task.label) has "
            f"{', '.join(sorted(found)) or 'nothing'} in every row; there must be {least} or more "
            "classes. Name them with task.labels if train is meant to lack some."
        )
    return tuple(sorted(found))


def _with_validation(
    records: Mapping[str, list[Record]], folder: pathlib.Path
) -> dict[str, list[Record]]:
    """The same, with validation rows taken out of train."""
    parts: tuple[list[Record], list[Record]] = ([], [])
    for record in records["train"]:
        text = "\t".join((record.first, record.second or ""))
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        parts[int.from_bytes(digest[:8], "big") % VALIDATION_PARTS == 0].append(record)
    if not all(parts):
        raise UserError(
            f"{folder}: {len(records['train'])} training rows are too few to split a validation "
            "set off; name one with task.validation."
        )
    others = {name: found for name, found in records.items() if name != "train"}
    return {"train": parts[0], "validation": parts[1], **others}


def _examples(
    records: Sequence[Record], kind: Kind, places: Mapping[str, int], problems: Problems
) -> Iterator[Example]:
    """Rows with labels as places; those with an unknown class are left out and named."""
    for record in records:
        label = record.label
        if label is not None and kind.name == "classification":
            label = classification.class_of(label, places, problems, record.path, record.line)
            if label is None:
                continue
        elif label is not None and kind.name == "multi_label":
            found = [
                classification.class_of(name, places, problems, record.path, record.line)
                for name in label
            ]
            if None in found:
                continue
            label = np.array([place in found for place in range(len(places))])
        yield Example(record.key, record.first, record.second, label)
