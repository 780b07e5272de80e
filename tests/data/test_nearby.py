"""Shards are there when they are wanted, the next ones too, and no more than may be kept."""

import concurrent.futures
import random
import threading
import time

import numpy as np
import pytest

from albert_jax.data import examples, nearby, order, store
from albert_jax.errors import UserError
from tests.data import slow_examples as slow

SIZES = [100, 200, 50, 100, 300, 100]


class Disk:
    """Where shards are local or not; counts what is done to it."""

    def __init__(self, tokens: list[np.ndarray] | None = None) -> None:
        self.tokens = tokens or [np.full(size, number) for number, size in enumerate(SIZES)]
        self.local: set[int] = set()
        self.fetched: list[int] = []
        self.most = 0
        self._lock = threading.Lock()

    def fetch(self, shard: int) -> np.ndarray:
        with self._lock:
            self.local.add(shard)
            self.fetched.append(shard)
            self.most = max(self.most, sum(self.tokens[each].size for each in self.local))
        return self.tokens[shard].copy()

    def drop(self, shard: int) -> None:
        with self._lock:
            self.local.remove(shard)

    def settled(self, wanted: set[int]) -> bool:
        """Waits until exactly these are local."""
        end = time.monotonic() + 20
        while self.local != wanted and time.monotonic() < end:
            time.sleep(0.005)
        return self.local == wanted


def near(disk: Disk, most: int) -> nearby.NearShards:
    return nearby.NearShards(disk.fetch, disk.drop, [each.size for each in disk.tokens], most)


def test_what_comes_next_is_fetched_and_what_was_used_dropped():
    disk = Disk()
    shards = near(disk, 400)
    held = shards.held([0, 1], [2])
    assert {shard: set(tokens) for shard, tokens in held.items()} == {0: {0}, 1: {1}}
    assert disk.settled({0, 1, 2})
    shards.held([2], [3])
    assert disk.settled({1, 2, 3})  # 0, which was wanted longest ago, made room
    shards.held([3], [4])
    assert disk.settled({3, 4})
    shards.held([4], [1])  # for which there is no room
    time.sleep(0.05)
    assert disk.local == {3, 4}
    assert disk.fetched == [0, 1, 2, 3, 4]
    assert disk.most <= 400 + 100  # of the one under way while another is dropped


def test_a_bound_that_a_window_does_not_fit_in_is_refused():
    near(Disk(), 300).held([0, 1], [])
    with pytest.raises(UserError, match=r"data\.cache_gib=2.78465e-07 is less than the 2.79e-07"):
        near(Disk(), 299).held([0, 1], [])


def test_a_failed_fetch_is_tried_again():
    disk, failures = Disk(), [UserError("the bucket is away")]

    def fetch(shard: int) -> np.ndarray:
        if failures:
            raise failures.pop()
        return disk.fetch(shard)

    shards = nearby.NearShards(fetch, disk.drop, SIZES, 400)
    with pytest.raises(UserError, match="the bucket is away"):
        shards.held([1], [])
    assert set(shards.held([1], [])[1]) == {1}


def test_many_threads_have_what_they_want():
    disk = Disk()
    shards = near(disk, 650)

    def reader(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            now = rng.sample(range(len(SIZES)), 2)
            for shard, tokens in shards.held(now, [rng.randrange(len(SIZES))]).items():
                assert set(tokens) == {shard}

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(reader, range(4)))


@pytest.mark.parametrize("objective", ["sop", "nsp", "none"])
def test_examples_are_the_same_with_a_few_shards_at_a_time(objective: str):
    rng = np.random.default_rng(1)
    split = [
        [[rng.integers(5, 40, 9).tolist() for _ in range(12)] for _ in range(3)] for _ in range(12)
    ]
    words = examples.Vocabulary(40, 2, 3, 4, np.arange(40) % 3 > 0, np.arange(40) < 5)
    options = examples.ExampleOptions(
        24, 4, 0.15, 3, 0.1, 3, objective, "random_next", shuffle="shard", shuffle_shards=2
    )
    whole = slow.shards(split)
    disk = Disk([shard.tokens for shard in whole])
    bound = 4 * disk.tokens[0].size
    offsets = [
        store.Shard(np.broadcast_to(np.zeros((), np.uint16), shard.tokens.shape), *shard_offsets)
        for shard in whole
        for shard_offsets in [(shard.sentences, shard.documents)]
    ]
    few = examples.ExampleBuilder(offsets, words, options, near(disk, bound))
    all_of_them = examples.ExampleBuilder(whole, words, options)
    N = all_of_them.examples_per_epoch
    for first in range(0, 2 * N, 5):
        wanted, found = (each.batch(first, first + 5) for each in (all_of_them, few))
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values)
    # Each shard once an epoch, and never many of them.
    assert disk.most <= bound + disk.tokens[0].size
    assert 24 <= len(disk.fetched) <= 24 + 4


def test_near_are_the_window_of_an_example_and_the_next():
    counts = np.array([5, 0, 3, 9, 4, 1])
    of = order.Order(np.concatenate([[0], np.cumsum(counts)]), 3, 4)
    N = counts.sum()
    for example in range(3 * N):
        now, coming = of.shards(np.array([-1, example]))
        epoch, row = (each[0] for each in of.places(np.array([example])))
        assert epoch == example // N
        assert np.searchsorted(np.cumsum(counts), row, side="right") in now
        assert not set(now) & set(coming)
        assert len(now) in (2, 4)
