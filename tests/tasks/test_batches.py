"""Batches of rows against slow plain Python: lengths against a search of all choices, arrays
against lists that are padded one by one, orders against what an epoch must hold, and the parts of
two hosts against the batch of one.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from albert_jax.tasks import batches, task
from albert_jax.tasks.task import Features

PAD = 3


def of_lengths(each: Sequence[int]) -> Features:
    """Rows of one sequence each, of these lengths."""
    return task.features([([7] * length, [0] * length) for length in each])


def random_rows(
    count: int, choices: int = 1, longest: int = 40, seed: int = 0
) -> tuple[Features, list[list[dict[str, list[int]]]], dict[str, list[Any]]]:
    """Features; and the same as lists: of each row, of each choice, its arrays by name; and the
    targets of each row by name.
    """
    generator = np.random.default_rng(seed)
    plain: list[list[dict[str, list[int]]]] = [
        [
            {
                "ids": generator.integers(5, 99, length).tolist(),
                "types": generator.integers(0, 2, length).tolist(),
                "labels": generator.integers(-1, 4, length).tolist(),
                "answerable": generator.integers(0, 2, length).tolist(),
            }
            for length in generator.integers(1, longest + 1, choices)
        ]
        for _ in range(count)
    ]
    targets = {
        "labels": generator.integers(0, 9, count).astype(np.int32),
        "several": generator.random((count, 3)).astype(np.float32),
    }
    beside = ("answerable",) if choices > 1 else ("answerable", "labels")
    if "labels" in beside:
        del targets["labels"]  # a batch has one thing of a name
    flat = [one for row in plain for one in row]
    made = task.features(
        [(one["ids"], one["types"]) for one in flat],
        choices=choices,
        targets=targets,
        token_targets={name: [one[name] for one in flat] for name in beside},
    )
    return made, plain, {name: array.tolist() for name, array in targets.items()}


def epoch(rows: batches.Rows, size: int, number: int = 0) -> list[dict[str, np.ndarray]]:
    """All batches of an epoch."""
    every = rows.examples_per_epoch
    return [
        rows.rows(np.arange(begin, begin + size))
        for begin in range(number * every, (number + 1) * every, size)
    ]


def order(rows: batches.Rows, size: int, number: int = 0) -> list[int]:
    return np.concatenate([batch["row"] for batch in epoch(rows, size, number)]).tolist()


def padding(each: Sequence[int], chosen: Sequence[int]) -> int:
    """What rows of these lengths are padded by, each to the least of the lengths that holds it."""
    return sum(min(one for one in chosen if one >= length) - length for length in each)


def test_lengths_have_the_least_padding_of_all_choices():
    generator = np.random.default_rng(0)
    counts = set()
    for _ in range(150):
        longest = int(generator.choice([8, 20, 40, 64]))
        each = generator.integers(1, 70, generator.integers(1, 12))
        if generator.random() < 0.5:  # all of them long
            each = each // 2 + 34
        cut = np.minimum(each, longest).tolist()
        parts = [of_lengths(part.tolist()) for part in np.split(each, [len(each) // 3])]
        found = batches.lengths(parts, longest)
        assert list(found) == sorted(set(found))
        assert len(found) <= 4
        possible = {*range(8, longest + 1, 8), longest}
        assert set(found) <= possible
        assert max(cut) <= found[-1] <= longest
        least = min(
            padding(cut, chosen)
            for count in range(1, min(4, len(possible)) + 1)
            for chosen in itertools.combinations(sorted(possible), count)
            if chosen[-1] >= max(cut)
        )
        assert padding(cut, found) == least, (cut, found)
        counts.add((len(found), len(set(-(-np.array(cut) // 8)))))
    # As many lengths as sizes, or four of more: there the search had something to choose.
    assert {(1, 1), (2, 2), (3, 3), (4, 4), (4, 5), (4, 6)} <= counts


def test_a_row_of_choices_is_as_long_as_its_longest():
    made, plain, _ = random_rows(9, choices=3)
    each = [max(len(one["ids"]) for one in row) for row in plain]
    assert batches.lengths([made], 64) == batches.lengths([of_lengths(each)], 64)


def test_without_rows_there_is_a_length_and_no_batch():
    assert batches.lengths([], 64) == batches.lengths([of_lengths([])], 64) == (8,)
    assert batches.lengths([], 6) == (6,)
    assert batches.Rows(of_lengths([]), 4, (8,), PAD).examples_per_epoch == 0


@pytest.mark.parametrize("size", [1, 4, 7, 24, 64])
@pytest.mark.parametrize("seed", [None, 5])
def test_an_epoch_holds_every_row_once(size: int, seed: int | None):
    made, _, _ = random_rows(24)
    rows = batches.Rows(made, size, batches.lengths([made], 40), PAD, seed)
    assert rows.examples_per_epoch == -(-24 // size) * size
    for number in (0, 1, 5):
        found = order(rows, size, number)
        assert sorted(row for row in found if row >= 0) == list(range(24))
        assert found.count(-1) == -24 % size


@pytest.mark.parametrize(("choices", "seed"), [(1, None), (1, 2), (3, None), (3, 2)])
def test_arrays_are_those_padded_one_by_one(choices: int, seed: int | None):
    # 32: some sequences are longer than the longest length, and cut.
    made, plain, targets = random_rows(21, choices)
    possible, size = (8, 16, 32), 4
    rows = batches.Rows(made, size, possible, PAD, seed)
    seen = 0
    for batch in epoch(rows, size, 1):
        real = [row for row in batch["row"].tolist() if row >= 0]
        longest = max(min(len(one["ids"]), 32) for row in real for one in plain[row])
        length = next(one for one in possible if one >= longest)
        fills = {"input_ids": PAD, "labels": -1}
        names = {"input_ids": "ids", "token_type_ids": "types"}
        names |= {name: name for name in made.token_targets}
        wanted: dict[str, list[Any]] = {name: [] for name in (*names, "attention_mask")}
        for row in batch["row"].tolist():
            here: dict[str, list[list[int]]] = {name: [] for name in wanted}
            for choice in range(choices):
                one = plain[row][choice] if row >= 0 else {key: [] for key in plain[0][0]}
                for name, source in names.items():
                    kept = one[source][:length]
                    here[name].append(kept + [fills.get(name, 0)] * (length - len(kept)))
                kept = one["ids"][:length]
                here["attention_mask"].append([1] * len(kept) + [0] * (length - len(kept)))
            for name, of_choices in here.items():
                wanted[name].append(of_choices if choices > 1 else of_choices[0])
        assert set(batch) == {*wanted, *targets, "row"}
        for name, values in wanted.items():
            assert batch[name].dtype == np.int32
            assert batch[name].tolist() == values, name
        for name, values in targets.items():
            assert batch[name].dtype == made.targets[name].dtype
            assert len(batch[name]) == size
            for place, row in enumerate(batch["row"].tolist()):
                assert row < 0 or batch[name][place].tolist() == values[row]
        seen += len(real)
    assert seen == 21


def test_the_same_seed_gives_the_same_batches_and_another_others():
    made, _, _ = random_rows(60)
    possible = batches.lengths([made], 40)
    first, again, other = (batches.Rows(made, 8, possible, PAD, seed) for seed in (1, 1, 2))
    order(again, 8, 3)  # what was asked for before plays no part
    for one, two in zip(epoch(first, 8), epoch(again, 8), strict=True):
        assert set(one) == set(two)
        assert all(np.array_equal(one[name], two[name]) for name in one)
    orders = [order(first, 8), order(first, 8, 1), order(first, 8, 2), order(other, 8)]
    assert all(one != two for one, two in itertools.combinations(orders, 2))


def test_evaluation_goes_by_length_and_is_the_same_in_each_epoch():
    made, plain, _ = random_rows(30)
    rows = batches.Rows(made, 4, batches.lengths([made], 40), PAD)
    found = [row for row in order(rows, 4) if row >= 0]
    each = [len(plain[row][0]["ids"]) for row in found]
    assert each == sorted(each)
    assert order(rows, 4, 7) == order(rows, 4)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_parts_of_two_hosts_are_the_batch_of_one(seed: int | None):
    made, _, _ = random_rows(27)
    possible, size = batches.lengths([made], 40), 8
    assert len(possible) > 1
    whole = epoch(batches.Rows(made, size, possible, PAD, seed), size, 2)
    hosts = [batches.Rows(made, size, possible, PAD, seed) for _ in range(2)]
    every = hosts[0].examples_per_epoch
    # Hosts' rows need not lie side by side.
    shares = [np.array([0, 1, 4, 5]), np.array([2, 3, 6, 7])]
    for number, batch in enumerate(whole):
        begin = 2 * every + number * size
        parts = [host.rows(begin + share) for host, share in zip(hosts, shares, strict=True)]
        for name, array in batch.items():
            for part, share in zip(parts, shares, strict=True):
                assert part[name].shape[1:] == array.shape[1:]
                assert np.array_equal(part[name], array[share]), name


def test_shuffling_mixes_rows_and_lengths():
    generator = np.random.default_rng(0)
    each = np.sort(generator.integers(1, 65, 2000))  # as a file that is sorted by length
    made = of_lengths(each.tolist())
    possible = batches.lengths([made], 64)
    rows = batches.Rows(made, 8, possible, PAD, 1)
    orders = [np.array(order(rows, 8, number)) for number in range(2)]
    for found in orders:
        places = np.arange(len(found))
        means = each[found].reshape(-1, 8).mean(axis=1)
        # No trend over the epoch: of lengths, or of the place in the file. 0.2 is three times the
        # standard deviation of what 250 batches in any order have.
        assert abs(np.corrcoef(places[::8], means)[0, 1]) < 0.2
        assert abs(np.corrcoef(places, found)[0, 1]) < 0.2
        # Yet like meets like: hardly more padding than the lengths themselves leave.
        padded = sum(batch["input_ids"].size for batch in epoch(rows, 8)) - each.sum()
        alone = padding(each.tolist(), possible)
        by_chance = np.max(generator.permutation(each).reshape(-1, 8), axis=1)
        assert padded < alone + 0.1 * (8 * by_chance.sum() - each.sum() - alone)
    # Rows that met once have others beside them the next time.
    together = [
        {
            frozenset(two)
            for batch in found.reshape(-1, 8)
            for two in itertools.combinations(batch, 2)
        }
        for found in orders
    ]
    assert len(together[0] & together[1]) < 0.1 * len(together[0])
