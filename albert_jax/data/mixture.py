"""Several token stores as one builder of examples: each with its exact share of every block.

In:  stores (`Stores`: of one tokenizer and normalisation), for each what makes its examples
     (`examples.ExampleBuilder`, or anything with its surface), its weight, and a seed.
Out: the surface of an `ExampleBuilder`, so that nothing after it knows of a mixture.

Promise: example i of a run is a pure function of (stores, weights, seed, i), in constant time; the
examples that the mixture takes of a store are those of the store's own stream, in order and each
once. So a store is repeated as its weight asks, with new masks each time.

Below is the whole specification; `tests/data/slow_mixture.py` is written from it.

Weights are exact fractions, as they are written in decimals, divided by their sum. Example i is
place p = i mod 1000 of block n = i div 1000. Store s with share w has in each block the whole part
of 1000 w. What is left of the block goes to stores with a remainder, one place each: with D the
least common denominator of all 1000 w, each remainder is a number of D-ths, and these are laid one
behind the other, in the order of the stores, on a line of whole length; the stores that get a place
in block n are those on whose piece of the line the points x/D + 0, x/D + 1, ... come to lie, where
x = n g mod D and g is the number nearest to D / 1.618..., and at or above it first, that has no
divisor with D. So D blocks hold each store exactly as often as its weight says, however small, and
any number of blocks very nearly.

The places of a block are dealt out in the order of the stores to the slots of a permutation keyed
by (seed, MIX, n), see `examples`: place p belongs to the store in whose range the permuted p lies.
The j-th place of a block that a store has, in the order of the permuted numbers, is its example
number j + all its places in the blocks before.

Shapes: B examples, S stores.
"""

import bisect
import dataclasses
import decimal
import fractions
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from albert_jax.data import compilation, examples, pipeline, store
from albert_jax.data import order as order_lib
from albert_jax.data import tokenizer as tokenizer_lib
from albert_jax.errors import UserError

BLOCK = 1000  # examples
_GOLDEN = (math.sqrt(5) - 1) / 2
_BLOCKS_KEPT = 64
_compiled = compilation.compiled


class Mixture:
    """Builds any examples of a mixture. Safe to call from many threads at once.

    Args:
        builders: of the stores, in order.
        weights: of each, exact; only their proportions count.
        seed: of the places inside the blocks.

    Attributes:
        builders: of the stores.
        examples_per_epoch: of all stores together. (Each store has epochs of its own.)
    """

    def __init__(
        self, builders: Sequence[pipeline.Builder], weights: Sequence[fractions.Fraction], seed: int
    ) -> None:
        self.builders, self._shares, self._seed = builders, Shares(weights), np.uint64(seed)
        self.examples_per_epoch = sum(builder.examples_per_epoch for builder in builders)
        self._block = functools.lru_cache(maxsize=_BLOCKS_KEPT)(self._shares.block)

    def batch(self, first: int, last: int) -> dict[str, np.ndarray]:
        """Examples [first, last) of the run; else as `rows`."""
        return self.rows(np.arange(first, last, dtype=np.int64))

    def rows(self, examples_B: np.ndarray) -> dict[str, np.ndarray]:
        """As `ExampleBuilder.rows`."""
        stores_B, numbers_B = self.places(np.ascontiguousarray(examples_B, dtype=np.int64))
        taken = np.unique(stores_B).tolist() or [0]
        if len(taken) == 1:
            return self.builders[taken[0]].rows(numbers_B)
        batch: dict[str, np.ndarray] = {}
        for number in taken:
            mine = np.flatnonzero(stores_B == number)
            for name, values in self.builders[number].rows(numbers_B[mine]).items():
                if name not in batch:
                    shape = (len(examples_B), *values.shape[1:])
                    batch[name] = examples.aligned(shape, values.dtype)
                batch[name][mine] = values
        return batch

    def places(self, examples_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The store of each example, int64 [B], and its number in that store's own stream; 0 and
        -1 for a negative number.
        """
        stores_B = np.zeros(len(examples_B), np.int64)
        numbers_B = np.full(len(examples_B), -1, np.int64)
        blocks_B = examples_B // BLOCK
        for n in np.unique(blocks_B[examples_B >= 0]).tolist():
            mine = np.flatnonzero(blocks_B == n)
            ranks = _shuffled(examples_B[mine] - n * BLOCK, n, self._seed)
            block = self._block(n)
            stores = np.searchsorted(block.ends_S, ranks, side="right")
            stores_B[mine] = stores
            numbers_B[mine] = ranks + block.shift_S[stores]
        return stores_B, numbers_B


@_compiled
def _shuffled(places_B: np.ndarray, n: int, seed: np.uint64) -> np.ndarray:
    ranks_B = np.empty(len(places_B), np.int64)
    of_block = order_lib.key(seed, order_lib.MIX, n, 0)
    for b in range(len(places_B)):
        ranks_B[b] = order_lib.permuted(places_B[b], BLOCK, of_block)
    return ranks_B


class Block(NamedTuple):
    """How a block is dealt out."""

    ends_S: np.ndarray  # int64, behind the last place of each store
    shift_S: np.ndarray  # int64, from a place to a number in the store's own stream


class Shares:
    """How many places of each block, and of all before it, are a store's.

    Args:
        weights: of the stores; only their proportions count.
    """

    def __init__(self, weights: Sequence[fractions.Fraction]) -> None:
        exact = [BLOCK * weight / sum(weights) for weight in weights]
        self._whole = [math.floor(share) for share in exact]
        self._denominator = math.lcm(*(share.denominator for share in exact))
        left = [
            int((share - whole) * self._denominator)
            for share, whole in zip(exact, self._whole, strict=True)
        ]
        self._ends = [sum(left[: s + 1]) for s in range(len(left))]  # on the line, in D-ths
        self._stride = _stride(self._denominator)

    def block(self, n: int) -> Block:
        """How block n is dealt out."""
        before, after = self.before(n), self.before(n + 1)
        ends = np.cumsum(np.array(after) - np.array(before))
        begins = np.concatenate([[0], ends[:-1]])
        return Block(ends, np.array(before) - begins)

    def before(self, n: int) -> list[int]:
        """How many places each store has in all blocks before the n-th."""
        passed = [self._points_below(end, n) for end in self._ends]
        return [
            n * whole + end - begin
            for whole, begin, end in zip(self._whole, [0, *passed], passed, strict=False)
        ]

    def _points_below(self, end: int, n: int) -> int:
        """How many points of the first n blocks lie before `end` on the line."""
        D, g = self._denominator, self._stride
        rounds, rest = divmod(end, D)
        # A point x = t g mod D is below `rest` where floor(t g / D) > floor((t g - rest) / D).
        return rounds * n + _floor_sum(n, D, g, 0) - _floor_sum(n, D, g, -rest)


def _stride(D: int) -> int:
    """The step that spreads the points of any number of blocks most evenly over D places."""
    nearest = round(D * _GOLDEN)
    candidates = (nearest + sign * away for away in range(D + 1) for sign in (1, -1))
    return next(g for g in candidates if 0 < g <= D and math.gcd(g, D) == 1)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Sum over t in [0, n) of floor((a t + b) / m), in as many steps as Euclid's algorithm takes.

    (Graham, Knuth and Patashnik, Concrete Mathematics, section 3.5: sums of floors, reciprocally.)
    """
    total = 0
    sign = 1
    while n > 0:
        total += sign * (a // m * (n * (n - 1) // 2) + b // m * n)
        a, b = a % m, b % m
        highest = (a * (n - 1) + b) // m
        # Points under the line, counted by columns, are all of the rectangle but those above it,
        # which the rows count: sum over y in [0, highest) of floor((m y + m - b - 1) / a) + 1.
        total += sign * highest * n
        if highest == 0:
            break
        sign = -sign
        total += sign * highest
        n, m, a, b = highest, a, m, m - b - 1
    return total


class Chain:
    """The evaluations of several builders, one behind the other, as one builder.

    Args:
        builders: of the parts.
        batch_size: B, over all hosts; a batch is of one part.
        limit: batches of each part at most; None: all of it.

    Attributes:
        examples_per_epoch: of all parts, rows that fill up their last batches among them.
        batches: how many each part has.
    """

    def __init__(
        self, builders: Sequence[pipeline.Builder], batch_size: int, limit: int | None = None
    ) -> None:
        self._builders = builders
        counts = [-(-builder.examples_per_epoch // batch_size) for builder in builders]
        self.batches = [count if limit is None else min(count, limit) for count in counts]
        self._ends = np.cumsum([count * batch_size for count in self.batches])
        self.examples_per_epoch = int(self._ends[-1]) if builders else 0

    def rows(self, examples_B: np.ndarray) -> dict[str, np.ndarray]:
        """As `ExampleBuilder.rows`; all of one batch."""
        first = int(examples_B[0]) if len(examples_B) else 0
        part = min(bisect.bisect_right(self._ends.tolist(), first), len(self._builders) - 1)
        before = int(self._ends[part - 1]) if part else 0
        builder, numbers_B = self._builders[part], examples_B - before
        return builder.rows(np.where(numbers_B < builder.examples_per_epoch, numbers_B, -1))


@dataclasses.dataclass(frozen=True)
class Stores:
    """Several stores that a run reads as one.

    Attributes:
        stores: in the order of `data.path`.
        weights: their shares of the examples; the sum is 1.
    """

    stores: tuple[store.Store, ...]
    weights: tuple[fractions.Fraction, ...]

    def __post_init__(self) -> None:
        """Raises UserError for stores that cannot be read as one, and for one that comes twice."""
        first = self.stores[0]
        for other in self.stores[1:]:
            theirs, ours = (each.manifest["tokenizer"]["sha256"] for each in (other, first))
            if theirs != ours:
                raise UserError(
                    f"data.path: {first.place} and {other.place} were prepared with different "
                    f"tokenizers (SHA-256 {ours[:12]} and {theirs[:12]}); prepare one of them "
                    f"again with --tokenizer={first.tokenizer_path}."
                )
            theirs, ours = (each.manifest["normalization"] for each in (other, first))
            if theirs != ours:
                differing = sorted(
                    name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)
                )
                raise UserError(
                    f"data.path: {first.place} and {other.place} were prepared with different "
                    f"normalisation ({', '.join(differing)}); prepare one of them again with the "
                    "other's."
                )
        for place, each in enumerate(self.stores):
            if each.fingerprint in [before.fingerprint for before in self.stores[:place]]:
                raise UserError(
                    f"data.path names {each.place} twice, or a copy of it; give it once, with the "
                    "sum of the weights."
                )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the data, stores and weights."""
        decisive = [
            [each.fingerprint, str(weight)]
            for each, weight in zip(self.stores, self.weights, strict=True)
        ]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """Of each store, the last parts of its path that tell it from the others."""
        parts = [tuple(each.place.split("/")) for each in self.stores]
        depth = 1
        while len({part[-depth:] for part in parts}) < len({*parts}):
            depth += 1
        return tuple("/".join(part[-depth:]) for part in parts)

    @property
    def place(self) -> str:
        """Where they all are, for people and for `data.path`."""
        return ",".join(each.place for each in self.stores)

    @property
    def vocab_size(self) -> int:
        """V, number of pieces of the tokenizer."""
        return self.stores[0].vocab_size

    @property
    def unigram_loss(self) -> float:
        """The mean by weight of each store's own; see `Store.unigram_loss`."""
        losses = [
            float(weight) * each.unigram_loss
            for each, weight in zip(self.stores, self.weights, strict=True)
        ]
        return sum(losses)

    def tokenizer(self) -> tokenizer_lib.Tokenizer:
        """The tokenizer of all stores, and its normalisation; errors as in `Store.tokenizer`."""
        return self.stores[0].tokenizer()


def open_stores(paths: Sequence[str], weights: str, whole: bool = True) -> Stores:
    """The stores of `data.path`, in the shares of `data.weights`; `whole` as in `store.open_store`.

    Raises:
        UserError: as `store.open_store` does; stores that do not go together, or weights that are
            not one for each.
    """
    shares = parse_weights(weights, len(paths))
    return Stores(tuple(store.open_store(path, whole) for path in paths), shares)


def parse_weights(text: str, stores: int) -> tuple[fractions.Fraction, ...]:
    """The weights of `data.weights`, exactly as they are written; all alike where it is empty.

    Raises:
        UserError: not as many as there are stores, or not all of them numbers above 0.
    """
    if not text.strip():
        return (fractions.Fraction(1, stores),) * stores
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != stores:
        raise UserError(
            f"data.weights={text} has {len(parts)} weights, but data.path names {stores} stores; "
            "give one for each, with commas between."
        )
    try:
        weights = tuple(fractions.Fraction(decimal.Decimal(part)) for part in parts)
    except (decimal.InvalidOperation, ValueError, OverflowError):
        weights = ()
    if not weights or min(weights) <= 0:
        raise UserError(f"data.weights={text} must be numbers above 0, such as 0.7,0.3.")
    return tuple(weight / sum(weights) for weight in weights)
