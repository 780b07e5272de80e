"""Which row an example is: of all rows of a split in one permutation, or of a few shards at a time.

In:  how many rows each shard has (a row is a chunk, or with packing several), the seed, and numbers
     of examples.
Out: for each example its epoch, and the number in the split of its row.

Promise: a pure function of (rows of each shard, seed, example), in constant time; an epoch visits
every row once. The specification stands in the docstring of `examples`, whose random numbers are
made here as well.

numba keeps compiled code by the file that it stands in, and does not see that a function of another
file has changed. What other files compile in from here is `mix`, `key`, `scaled` and `permuted`
alone: they are part of the specification, and stay as they are.

Shapes: B examples, N rows, K shards.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from albert_jax.data import compilation

SHUFFLES = ("global", "shard")
GAMMA = np.uint64(0x9E3779B97F4A7C15)
# What a key is for; each purpose has random numbers of its own.
DOCUMENT, ORDER, EXAMPLE, OTHER = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
SHARDS, WINDOW, MIX = np.uint64(5), np.uint64(6), np.uint64(7)

_ROUNDS = 8
_EPOCHS_KEPT = 4
_compiled = compilation.compiled


@_compiled
def mix(z: np.uint64) -> np.uint64:
    """SplitMix64's finaliser."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_compiled
def key(seed: np.uint64, purpose: np.uint64, a: int, b: int) -> np.uint64:
    """Where a stream of random numbers begins."""
    return mix(mix(mix(mix(seed) ^ purpose) ^ np.uint64(a)) ^ np.uint64(b))


@_compiled
def scaled(draw: np.uint64, n: int) -> np.int64:
    """A draw as a number in [0, n)."""
    return np.int64(((draw >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32))


@_compiled
def permuted(slot: int, size: int, key: np.uint64) -> int:
    """What stands at a slot of the permutation of [0, size) that a key names."""
    width = math.ceil(math.sqrt(size))
    left, right = slot // width, slot % width
    while True:
        round_key = key
        for r in range(_ROUNDS):
            round_key += GAMMA
            if r % 2 == 0:
                left += scaled(mix(round_key ^ np.uint64(right)), width)
                left -= width if left >= width else 0
            else:
                right += scaled(mix(round_key ^ np.uint64(left)), width)
                right -= width if right >= width else 0
        if left * width + right < size:
            return left * width + right


class Order:
    """The order of a split's rows in a run.

    Args:
        first_row: int64 [K+1], number in the split of each shard's first row, and at the end N.
        seed: of the run's examples.
        window: how many shards are mixed with each other; 0: all.
    """

    def __init__(self, first_row: np.ndarray, seed: int, window: int = 0) -> None:
        self._first_row, self._seed, self._window = first_row, np.uint64(seed), window
        self._size = int(first_row[-1])
        self._plan = functools.lru_cache(maxsize=_EPOCHS_KEPT)(self._planned)

    def places(self, examples_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The epoch and the row of each example, int64 [B]; -1 for a negative number."""
        rows_B = np.full(len(examples_B), -1, np.int64)
        epochs_B = np.where(examples_B < 0, -1, examples_B // max(self._size, 1))
        if not self._window:
            _in_whole(examples_B, self._size, self._seed, rows_B)
            return epochs_B, rows_B
        for epoch in np.unique(epochs_B[epochs_B >= 0]).tolist():
            of_epoch = np.flatnonzero(epochs_B == epoch)
            slots = examples_B[of_epoch] - epoch * self._size
            rows_B[of_epoch] = _in_windows(
                slots, epoch, self._seed, self._plan(epoch), self._first_row
            )
        return epochs_B, rows_B

    def shards(self, examples_B: np.ndarray) -> tuple[list[int], list[int]]:
        """Which shards hold the rows of some examples and of all near them, and which come after
        those; all shards, and none, where there are no windows.
        """
        K = len(self._first_row) - 1
        real = examples_B[examples_B >= 0]
        if not self._window:
            return list(range(K)), []
        if not len(real):
            return [], []
        now: dict[int, None] = {}
        coming: dict[int, None] = {}
        windows = -(-K // self._window)
        for epoch, w in sorted({self._window_of(example) for example in real.tolist()}):
            now.update(dict.fromkeys(self._shards_of(epoch, w)))
            following = (epoch, w + 1) if w + 1 < windows else (epoch + 1, 0)
            coming.update(dict.fromkeys(self._shards_of(*following)))
        return list(now), [shard for shard in coming if shard not in now]

    def _window_of(self, example: int) -> tuple[int, int]:
        epoch, slot = divmod(example, self._size)
        begins = self._plan(epoch).window_begin
        return epoch, int(np.searchsorted(begins, slot, side="right")) - 1

    def _shards_of(self, epoch: int, w: int) -> list[int]:
        return self._plan(epoch).shard_K[w * self._window : (w + 1) * self._window].tolist()

    def _planned(self, epoch: int) -> "_Plan":
        shard_K = _shards_in_order(len(self._first_row) - 1, self._seed, epoch)
        counts_K = np.diff(self._first_row)[shard_K]
        first_slot = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_K)])
        window_begin = np.append(first_slot[:-1][:: self._window], first_slot[-1])
        return _Plan(shard_K, first_slot, window_begin)


class _Plan(NamedTuple):
    """An epoch's shards, in their order."""

    shard_K: np.ndarray  # int64, which shard comes when
    first_slot: np.ndarray  # int64 [K+1], the slot where each of them begins, and N
    window_begin: np.ndarray  # int64, the slot where each window begins, and N


@_compiled
def _in_whole(examples_B: np.ndarray, size: int, seed: np.uint64, rows_B: np.ndarray) -> None:
    for b in range(len(examples_B)):
        if examples_B[b] >= 0:
            epoch, slot = examples_B[b] // size, examples_B[b] % size
            rows_B[b] = permuted(slot, size, key(seed, ORDER, epoch, 0))


@_compiled
def _shards_in_order(K: int, seed: np.uint64, epoch: int) -> np.ndarray:
    shard_K = np.empty(K, np.int64)
    of_epoch = key(seed, SHARDS, epoch, 0)
    for position in range(K):
        shard_K[position] = permuted(position, K, of_epoch)
    return shard_K


@_compiled
def _in_windows(
    slots_B: np.ndarray, epoch: int, seed: np.uint64, plan: _Plan, first_row: np.ndarray
) -> np.ndarray:
    rows_B = np.empty(len(slots_B), np.int64)
    for b in range(len(slots_B)):
        # Of windows, or shards, that begin at one slot, all but the last are empty.
        w = np.searchsorted(plan.window_begin, slots_B[b], side="right") - 1
        begin = plan.window_begin[w]
        size = plan.window_begin[w + 1] - begin
        slot = begin + permuted(slots_B[b] - begin, size, key(seed, WINDOW, epoch, w))
        position = np.searchsorted(plan.first_slot, slot, side="right") - 1
        rows_B[b] = first_row[plan.shard_K[position]] + slot - plan.first_slot[position]
    return rows_B
