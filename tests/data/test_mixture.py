"""Each store has its exact share of a mixture, in its own order, and any example is had at once."""

import random
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from albert_jax.data import mixture
from albert_jax.errors import UserError
from tests.data import slow_mixture


class Numbered:
    """A source whose examples are their own numbers."""

    def __init__(self, store: int, size: int = 17) -> None:
        self._store, self.examples_per_epoch = store, size

    def rows(self, examples_B: np.ndarray) -> dict[str, np.ndarray]:
        stores_B = np.where(examples_B < 0, -1, self._store)
        return {"input_ids": np.stack([stores_B, examples_B], axis=1).astype(np.int32)}


WEIGHTS = [
    ["0.7", "0.3"],
    ["0.0004", "0.9996"],
    ["1", "1", "1"],
    ["0.25", "0.0307", "0.7", "0.0193"],
    ["5", "0.001"],
    ["0.33333", "0.00001", "0.66666"],
]


def made(weights: list[str], seed: int = 3) -> mixture.Mixture:
    sources = [Numbered(store) for store in range(len(weights))]
    return mixture.Mixture(sources, [Fraction(weight) for weight in weights], seed)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_equals_the_slow_version(weights: list[str]):
    wanted = slow_mixture.places([Fraction(weight) for weight in weights], 3, 12)
    found = made(weights).batch(0, 12_000)["input_ids"]
    np.testing.assert_array_equal(found, wanted)
    some = np.array([11_999, 3, -1, 4_711, 3, 1_000])
    anywhere = made(weights).rows(some)["input_ids"]
    assert anywhere.tolist() == [[-1, -1] if i < 0 else list(wanted[i]) for i in some.tolist()]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_store_gets_exactly_its_share_and_none_of_its_examples_twice(weights: list[str]):
    exact = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    shares = mixture.Shares(exact)
    rng = random.Random(1)
    for n in [0, 1, 2, 7, 8, *(rng.randrange(10**12) for _ in range(200))]:
        before, after = shares.before(n), shares.before(n + 1)
        here = [y - x for x, y in zip(before, after, strict=True)]
        assert sum(here) == 1000
        assert all(abs(got - 1000 * share) < 1 for got, share in zip(here, exact, strict=True))
        behind = [got - 1000 * n * share for got, share in zip(before, exact, strict=True)]
        assert max(map(abs, behind)) < 4  # of a thousand million million: nothing is lost
    period = 5001 * 10**8  # of all denominators above
    assert shares.before(3 * period) == [3000 * period * share for share in exact]


def test_a_store_of_four_in_ten_thousand_comes_evenly():
    stores = made(["0.0004", "0.9996"]).places(np.arange(100_000))[0]
    first = np.flatnonzero(stores == 0)
    assert len(first) == 40
    assert np.diff(first).max() < 5_001  # one in 2,500 on the mean


def test_the_places_of_a_block_are_mixed():
    stores = made(["0.5", "0.5"]).places(np.arange(1000))[0]
    changes = np.count_nonzero(np.diff(stores))
    assert 430 < changes < 570  # a fair coin's 500, four and a half deviations


def test_an_example_takes_no_longer_for_being_far_away():
    far = made(WEIGHTS[3])
    tracemalloc.start()
    rows = far.rows(np.array([10**15, 10**15 + 1]))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert rows["input_ids"].shape == (2, 2)


def test_evaluations_one_after_another_are_each_whole():
    chain = mixture.Chain([Numbered(0, 5), Numbered(1, 8), Numbered(2, 3)], 4, 2)
    assert (chain.batches, chain.examples_per_epoch) == ([2, 2, 1], 20)
    found = [
        chain.rows(np.arange(first, first + 4))["input_ids"].tolist() for first in range(0, 20, 4)
    ]
    assert found[1] == [[0, 4], [-1, -1], [-1, -1], [-1, -1]]
    assert [row for batch in found for row in batch if row != [-1, -1]] == [
        *([0, i] for i in range(5)),
        *([1, i] for i in range(8)),
        *([2, i] for i in range(3)),
    ]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("0.7", "has 1 weights, but data.path names 2 stores"),
        ("0.7,x", "must be numbers above 0"),
        ("1,0", "must be numbers above 0"),
        ("1,nan", "must be numbers above 0"),
        ("inf,1", "must be numbers above 0"),
    ],
)
def test_weights_that_are_none_are_refused(weights: str, message: str):
    with pytest.raises(UserError, match=message):
        mixture.parse_weights(weights, 2)
