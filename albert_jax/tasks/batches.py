"""Rows of a task as batches of few lengths, so that short texts do not pay for long ones and each
length is compiled once.

In:  `Features`, and how many rows a batch has.
Out: builders as `data.pipeline` wants them; a batch has `input_ids`, `token_type_ids` and
     `attention_mask` int32 [B, L] (or [B, C, L]), the features' targets [B, ...], their token
     targets [B, L], and `row` int32 [B], which row of the features it is, -1 where a row only fills
     up a batch (its `attention_mask` is 0 everywhere).

Promise: the batches of an epoch are a pure function of (features, seed, epoch). They hold each row
once; rows of like length meet in a batch, batches come in random order, and L is one of `lengths`.

Letters: B batch, C choices, L length.
"""

import functools
from collections.abc import Sequence

import numpy as np

from albert_jax.tasks.task import NOT_COUNTED, Features

_MOST_LENGTHS = 4
_UNIT = 8  # lengths are multiples of it
_POOL = 50  # batches, at most, whose rows are put together by length
_POOLS = 4  # at least, in an epoch: else short texts and long ones would hardly ever meet
_FILL = -1


def lengths(parts: Sequence[Features], longest: int) -> tuple[int, ...]:
    """The few lengths to which the rows of `parts` are padded: those with the least padding.

    Args:
        parts: all that is trained on and evaluated.
        longest: no length is more.
    """
    of_rows = np.concatenate([np.zeros(0, np.int64), *(_row_lengths(part) for part in parts)])
    if not len(of_rows):
        return (min(_UNIT, longest),)
    units = np.minimum(-(-of_rows // _UNIT) * _UNIT, longest)
    sizes, counts = np.unique(units, return_counts=True)
    # best[k][i]: the least cost of the shortest i sizes in k groups, each as long as its longest.
    rows = np.concatenate([[0], np.cumsum(counts)])
    best = [np.where(np.arange(len(sizes) + 1) == 0, 0.0, np.inf)]
    chosen: list[list[int]] = []
    for _ in range(min(_MOST_LENGTHS, len(sizes))):
        costs, cuts = [0.0], [0]
        for stop in range(1, len(sizes) + 1):
            whole = best[-1][:stop] + (rows[stop] - rows[:stop]) * float(sizes[stop - 1])
            cuts.append(int(np.argmin(whole)))
            costs.append(float(whole[cuts[-1]]))
        best.append(np.asarray(costs))
        chosen.append(cuts)
    found, stop = [], len(sizes)
    for cuts in reversed(chosen):
        if stop == 0:
            break
        found.append(int(sizes[stop - 1]))
        stop = cuts[stop]
    return tuple(sorted(found))


class Rows:
    """Batches of features: shuffled anew in each epoch, or all rows once in order of length.

    Args:
        features: the rows.
        batch_size: B, over all hosts.
        lengths: what L may be, ascending.
        pad_id: the piece that pads.
        seed: of the order of rows; None for evaluation.
    """

    def __init__(
        self,
        features: Features,
        batch_size: int,
        lengths: Sequence[int],
        pad_id: int,
        seed: int | None = None,
    ) -> None:
        self._features, self._batch_size = features, batch_size
        self._lengths, self._pad_id, self._seed = np.asarray(lengths), pad_id, seed
        self._row_lengths = np.minimum(_row_lengths(features), lengths[-1])
        self._order = functools.lru_cache(maxsize=2)(self._epoch)

    @property
    def examples_per_epoch(self) -> int:
        """Rows of all batches of an epoch, those that only fill up among them."""
        return -(-len(self._features) // self._batch_size) * self._batch_size

    def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """A batch, or this host's part of it.

        Args:
            numbers: int64, of the run's examples; all of one batch.
        """
        if not len(numbers):
            return self._batch(np.empty(0, np.int64), int(self._lengths[0]))
        epoch, first = divmod(int(numbers[0]), self.examples_per_epoch)
        order = self._order(epoch if self._seed is not None else 0)
        begin = first // self._batch_size * self._batch_size
        whole = order[begin : begin + self._batch_size]
        longest = self._row_lengths[whole[whole >= 0]].max(initial=1)
        length = int(self._lengths[np.searchsorted(self._lengths, longest)])
        return self._batch(order[numbers % self.examples_per_epoch], length)

    def _epoch(self, epoch: int) -> np.ndarray:
        """The rows of all batches of an epoch one behind the other, int64; _FILL is none."""
        count, size = len(self._features), self._batch_size
        if self._seed is None:
            order = np.argsort(self._row_lengths, kind="stable")
            return np.append(order, np.full(-count % size, _FILL))
        draw = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        order = draw.permutation(count)
        pool_size = size * min(max(count // (size * _POOLS), 1), _POOL)
        pools = [order[start : start + pool_size] for start in range(0, count, pool_size)]
        # By the length that they are padded to, not by their own: a batch should be as mixed as it
        # may, for the label often has to do with the length.
        padded = np.searchsorted(self._lengths, self._row_lengths)
        pools = [pool[np.argsort(padded[pool], kind="stable")] for pool in pools]
        order = np.append(np.concatenate(pools), np.full(-count % size, _FILL))
        batches = order.reshape(-1, size)
        return batches[draw.permutation(len(batches))].reshape(-1)

    def _batch(self, chosen: np.ndarray, length: int) -> dict[str, np.ndarray]:
        features, choices = self._features, self._features.choices
        shape = (len(chosen), choices, length)
        ids = np.full(shape, self._pad_id, np.int32)
        types, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        beside = {
            name: np.full(shape, NOT_COUNTED if name == "labels" else 0, np.int32)
            for name in features.token_targets
        }
        for place, row in enumerate(chosen):
            for choice in range(choices if row >= 0 else 0):
                start = features.offsets[row * choices + choice]
                stop = min(features.offsets[row * choices + choice + 1], start + length)
                here = (place, choice, slice(0, stop - start))
                ids[here], types[here] = features.ids[start:stop], features.types[start:stop]
                mask[here] = 1
                for name, values in features.token_targets.items():
                    beside[name][here] = values[start:stop]
        sequences = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask, **beside}
        if choices == 1:
            sequences = {name: array[:, 0] for name, array in sequences.items()}
        # A row that fills up takes another's targets; its mask says that they do not count.
        taken = np.maximum(chosen, 0)
        targets = {name: values[taken] for name, values in features.targets.items()}
        return {**sequences, **targets, "row": chosen.astype(np.int32)}


def _row_lengths(features: Features) -> np.ndarray:
    """The longest sequence of each row, int64 [R]."""
    each = np.diff(features.offsets).reshape(-1, features.choices)
    return each.max(axis=1, initial=0)
