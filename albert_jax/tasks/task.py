"""A fine-tuning task as training sees it: rows of pieces, what is to be predicted of them, and how
predictions are scored and written.

In:  what a task's own module reads and tokenises.
Out: `Task`, with a `Split` for everything that is evaluated.

Letters: R rows, C choices, T pieces of all sequences, L length of one, K labels.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from albert_jax.data.tokenizer import Tokenizer

# Of each row, what the head says: by name, one float32 array a row, without padding.
Outputs = Mapping[str, Sequence[np.ndarray]]

WORD = re.compile(r"\w+|[^\w\s]")  # a word, or one sign; as CoNLL has them
NOT_COUNTED = -1  # a label that plays no part in loss and figures


@dataclasses.dataclass(frozen=True)
class Features:
    """Rows as the model reads them, of any length; all sequences lie one behind the other.

    Attributes:
        ids: int32 [T], special pieces included.
        types: int8 [T], the segment of each piece.
        offsets: int64 [R*C+1]; sequence i is `ids[offsets[i]:offsets[i + 1]]`.
        choices: C, sequences that make one row: 1, but for multiple choice and retrieval.
        targets: by name, an array whose first axis is R. Heads know these:
            sequence_classification: `labels` int32 [R] (NOT_COUNTED: none), float32 [R] (a number;
                NaN: none), or float32 [R, K] (several at once).
            multiple_choice: `labels` int32 [R].
            embedding: `query` int32 [R], equal where queries are.
            question_answering: `start_positions`, `end_positions` int32 [R], both 0 where there is
                no answer, and `is_impossible` float32 [R].
        token_targets: by name, an array beside `ids`, int32 [T].
            token_classification: `labels`, NOT_COUNTED where none is wanted.
            question_answering: `answerable`, 1 where an answer may begin or end.
    """

    ids: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    choices: int = 1
    targets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    token_targets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.choices

    def sequence(self, number: int) -> np.ndarray:
        """The ids of one sequence, int32 [L]."""
        return self.ids[self.offsets[number] : self.offsets[number + 1]]


@dataclasses.dataclass(frozen=True)
class Split:
    """What is evaluated.

    Attributes:
        name: "validation", "test", or whatever a task calls it.
        features: its rows.
        score: outputs to figures by name; None where the split has no labels.
        write: writes outputs into a folder as the task's own kind of file; returns what it wrote.
    """

    name: str
    features: Features
    score: Callable[[Outputs], dict[str, float]] | None
    write: Callable[[Outputs, pathlib.Path], list[pathlib.Path]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, read and tokenised.

    Attributes:
        head: one of `model.finetuning.HEADS`.
        labels: names of the classes in the order of the scores; one for a number.
        train: rows to learn from.
        splits: to be evaluated; the first with a score decides which checkpoint is best.
        best_by: the figure of it that decides; more is better.
        notes: what a person should know of how it was read, a line each.
        settings: fields of `config.task` that only the files could tell.
        draw: draws pictures of the first split's outputs into a folder.
    """

    head: str
    labels: tuple[str, ...]
    train: Features
    splits: tuple[Split, ...]
    best_by: str
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    draw: Callable[[Outputs, pathlib.Path], None] | None = None


class Problems:
    """What was wrong with rows that were left out or changed: counted by kind, the first few named
    by file and line.
    """

    _SHOWN = 3

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = collections.defaultdict(list)
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, kind: str, path: pathlib.Path | str, line: int | str) -> None:
        """Counts one of a kind, e.g. "empty text, left out"; `line` counts from 1."""
        self._counts[kind] += 1
        if len(self._places[kind]) < self._SHOWN:
            self._places[kind].append(f"{path}:{line}")

    def notes(self) -> tuple[str, ...]:
        """A line a kind."""
        return tuple(
            f"{count:,} x {kind} ({', '.join(self._places[kind])}"
            + (", ..." if count > self._SHOWN else "")
            + ")"
            for kind, count in self._counts.items()
        )


def join(
    tokenizer: Tokenizer, first: Sequence[int], second: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """One sequence with special pieces: (ids, types) of [CLS] first [SEP] (second [SEP]); RoBERTa
    has two separators between, and one type.
    """
    ids = [tokenizer.cls_id, *first, tokenizer.sep_id]
    types = [0] * len(ids)
    if second is not None:
        roberta = tokenizer.family == "roberta"
        more = [*([tokenizer.sep_id] if roberta else []), *second, tokenizer.sep_id]
        ids += more
        types += [0 if roberta else 1] * len(more)
    return ids, types


def special_pieces(tokenizer: Tokenizer, pair: bool) -> int:
    """How many pieces `join` adds."""
    return len(join(tokenizer, [], [] if pair else None)[0])


def truncate_pair(first: list[int], second: list[int], room: int) -> bool:
    """Takes pieces off the end of the longer one (the second, where equal) until both fit; in
    place. Returns whether any were taken.

    Source: google-research/albert classifier_utils.py, `_truncate_seq_pair`.
    """
    before = len(first) + len(second)
    while len(first) + len(second) > room:
        (first if len(first) > len(second) else second).pop()
    return len(first) + len(second) < before


def features(
    sequences: Iterable[tuple[Sequence[int], Sequence[int]]],
    choices: int = 1,
    targets: Mapping[str, np.ndarray] | None = None,
    token_targets: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> Features:
    """Features out of (ids, types) pairs, and what stands beside rows and pieces."""
    ids: list[Any] = []
    types: list[Any] = []
    for sequence, segment in sequences:
        ids.append(np.asarray(sequence, np.int32))
        types.append(np.asarray(segment, np.int8))
    offsets = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(one) for one in ids], out=offsets[1:])
    return Features(
        ids=np.concatenate([np.zeros(0, np.int32), *ids]),
        types=np.concatenate([np.zeros(0, np.int8), *types]),
        offsets=offsets,
        choices=choices,
        targets=dict(targets or {}),
        token_targets={
            name: np.concatenate([np.zeros(0, np.int32), *(np.asarray(v, np.int32) for v in parts)])
            for name, parts in (token_targets or {}).items()
        },
    )
