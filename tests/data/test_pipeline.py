"""Each host gets its rows of the right batches, in order, and the stream ends cleanly."""

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Generator, Iterable

import numpy as np
import pytest

from albert_jax.data import examples, pipeline, store
from albert_jax.errors import UserError
from tests.data import slow_examples as slow

V = 40
Batches = list[dict[str, np.ndarray]]


def make_builder(
    shards: list[store.Shard],
    objective: str = "sop",
    kind: type[examples.ExampleBuilder] = examples.ExampleBuilder,
    length: int = 24,
) -> examples.ExampleBuilder:
    words = examples.Vocabulary(V, 2, 3, 4, np.arange(V) % 3 > 0, np.arange(V) < 5)
    options = examples.ExampleOptions(length, 4, 0.15, 3, 0.1, 3, objective, "split")
    return kind(shards, words, options)


@pytest.fixture(scope="module")
def shards() -> list[store.Shard]:
    rng = np.random.default_rng(0)
    return slow.shards(
        [
            [
                [rng.integers(5, V, rng.geometric(0.15)).tolist() for _ in range(sentences)]
                for sentences in (11, 4, 30)
            ]
            for _ in range(3)
        ]
    )


@pytest.fixture(scope="module")
def builder(shards: list[store.Shard]) -> examples.ExampleBuilder:
    return make_builder(shards)


def training_batches(
    builder: pipeline.Builder,
    first_step: int,
    last_step: int,
    batch_size: int,
    rows: list[tuple[int, int]],
) -> Generator[dict[str, np.ndarray], None, None]:
    stage = pipeline.Stage(builder, batch_size, rows)
    return pipeline.training_batches([stage], first_step, last_step)


def assert_same(found: Iterable[dict[str, np.ndarray]], wanted: Batches) -> None:
    found = list(found)
    assert len(found) == len(wanted)
    for mine, other in zip(found, wanted, strict=True):
        assert list(mine) == list(other)
        for name in mine:
            assert mine[name].dtype == other[name].dtype
            np.testing.assert_array_equal(mine[name], other[name])


def joined(parts: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("objective", ["sop", "none"])
def test_step_s_holds_examples_from_s_times_the_batch_size(
    shards: list[store.Shard], objective: str
):
    builder = make_builder(shards, objective)
    batches = training_batches(builder, 2, 9, 8, [(0, 8)])
    assert_same(batches, [builder.batch(8 * step, 8 * step + 8) for step in range(2, 9)])


@pytest.mark.parametrize("skipped", [[], [2], [29], [30, 31], [4, 30, 40]])
def test_a_curriculum_takes_one_batch_behind_the_other(
    shards: list[store.Shard], builder: examples.ExampleBuilder, skipped: list[int]
):
    longer = make_builder(shards, length=40)
    stages = [
        pipeline.Stage(builder, 6, [(0, 6)]),
        pipeline.Stage(longer, 4, [(0, 4)], first_batch=30, first_example=180),
        pipeline.Stage(builder, 5, [(0, 5)], first_batch=41, first_example=224),
    ]
    begin, wanted = 0, []
    for number in range(60):
        size, made = (6, builder) if number < 30 else (4, longer) if number < 41 else (5, builder)
        if number not in skipped:
            wanted.append(made.batch(begin, begin + size))
        begin += size
    wanted = wanted[:50]
    assert_same(pipeline.training_batches(stages, 0, 50, skipped), wanted)
    for stop in (28, 30, 33, 49):
        assert_same(pipeline.training_batches(stages, stop, 50, skipped), wanted[stop:])


def test_64_hosts_read_what_one_reads_and_16_go_on_with_it(shards: list[store.Shard]):
    parts = [(make_builder(shards), 128, 0, 0), (make_builder(shards, length=40), 64, 20, 2560)]

    def batches(hosts: int, first: int, last: int) -> Batches:
        streams = []
        for host in range(hosts):
            stages = []
            for made, size, *begin in parts:
                each = size // hosts
                rows = [(host * each, (host + 1) * each)]
                stages.append(pipeline.Stage(made, size, rows, *begin))
            # One process after another, as their hosts need not know of each other.
            streams.append(list(pipeline.training_batches(stages, first, last)))
        return [joined(rows) for rows in zip(*streams, strict=True)]

    one = batches(1, 0, 50)
    assert [len(batch["input_ids"]) for batch in one] == [128] * 20 + [64] * 30
    assert_same(batches(64, 0, 50), one)
    assert_same(batches(16, 25, 50), one[25:])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_the_same_global_batches(builder: examples.ExampleBuilder, hosts: int):
    each = 12 // hosts
    streams = [
        training_batches(builder, 0, 5, 12, [(host * each, (host + 1) * each)])
        for host in range(hosts)
    ]
    found = [joined(parts) for parts in zip(*streams, strict=True)]
    assert_same(found, [builder.batch(12 * step, 12 * step + 12) for step in range(5)])


def test_a_host_may_have_rows_here_and_there(builder: examples.ExampleBuilder):
    (batch,) = training_batches(builder, 3, 4, 12, [(8, 10), (1, 4)])
    assert_same([batch], [builder.rows(np.array([44, 45, 37, 38, 39]))])


def test_a_restart_goes_on_with_the_same_batches(builder: examples.ExampleBuilder):
    undisturbed = list(training_batches(builder, 0, 20, 7, [(0, 7)]))
    for stop in (1, 6, 19):
        assert_same(training_batches(builder, stop, 20, 7, [(0, 7)]), undisturbed[stop:])


@pytest.mark.parametrize("hosts", [1, 3])
def test_evaluation_sees_each_chunk_once_and_pads_with_zeros(
    builder: examples.ExampleBuilder, hosts: int
):
    N = builder.examples_per_epoch
    size = 9
    assert N % size
    each = size // hosts
    parts = [
        list(pipeline.evaluation_batches(builder, size, [(host * each, (host + 1) * each)]))
        for host in range(hosts)
    ]
    assert {len(part) for part in parts} == {-(-N // size)}
    whole = joined(joined(batches) for batches in zip(*parts, strict=True))
    epoch = builder.batch(0, N)
    for name, array in whole.items():
        np.testing.assert_array_equal(array[:N], epoch[name])
        assert not array[N:].any()


def test_evaluation_can_be_limited(builder: examples.ExampleBuilder):
    batches = list(pipeline.evaluation_batches(builder, 4, [(0, 4)], limit_batches=3))
    assert_same(batches, [builder.batch(4 * step, 4 * step + 4) for step in range(3)])
    assert len(list(pipeline.evaluation_batches(builder, 4, [(0, 4)], limit_batches=10**9))) == -(
        -builder.examples_per_epoch // 4
    )


def test_several_threads_keep_the_order(
    shards: list[store.Shard], builder: examples.ExampleBuilder, monkeypatch: pytest.MonkeyPatch
):
    class Uneven(examples.ExampleBuilder):
        """Takes longest for the first of every four batches."""

        def rows(self, examples_B: np.ndarray) -> dict[str, np.ndarray]:
            if examples_B[0] // size % 4 == 0:
                time.sleep(0.05)
            return super().rows(examples_B)

    size = 600  # large enough for a call of its own
    uneven = make_builder(shards, kind=Uneven)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    batches = training_batches(uneven, 0, 24, size, [(0, size)])
    assert_same(batches, [builder.batch(size * s, size * (s + 1)) for s in range(24)])


def test_batches_are_not_copied(shards: list[store.Shard]):
    built: set[int] = set()

    class Watched(examples.ExampleBuilder):
        """Remembers where its arrays lie."""

        def rows(self, examples_B: np.ndarray) -> dict[str, np.ndarray]:
            batch = super().rows(examples_B)
            built.update(array.ctypes.data for array in batch.values())
            return batch

    watched = make_builder(shards, kind=Watched)
    for batch in training_batches(watched, 0, 3, 64, [(0, 64)]):
        assert {array.ctypes.data for array in batch.values()} <= built


@pytest.mark.parametrize("size", [3, 600])  # many batches to a call, and one
def test_what_the_builder_raises_comes_out_as_it_is_after_what_came_before(
    shards: list[store.Shard], builder: examples.ExampleBuilder, size: int
):
    class Broken(examples.ExampleBuilder):
        """Can make four batches."""

        def rows(self, examples_B: np.ndarray) -> dict[str, np.ndarray]:
            if examples_B[0] == 4 * size:
                raise UserError("broken")
            return super().rows(examples_B)

    batches = training_batches(make_builder(shards, kind=Broken), 0, 100, size, [(0, size)])
    before = [next(batches) for _ in range(4)]
    assert_same(before, [builder.batch(size * s, size * (s + 1)) for s in range(4)])
    with pytest.raises(UserError, match="broken") as caught:
        next(batches)
    assert caught.value.__context__ is None


def test_an_id_that_the_vocabulary_does_not_have_is_named():
    bad = make_builder(slow.shards([[[[5, 6, 7] * 50], [[8, 9, V + 1]]]]))
    with pytest.raises(UserError, match=f"token 152 is {V + 1}"):
        list(training_batches(bad, 0, 100, 3, [(0, 3)]))


def test_rows_outside_the_batch_are_refused(builder: examples.ExampleBuilder):
    with pytest.raises(ValueError, match=r"rows \[4, 9\) are not in a batch of 8"):
        training_batches(builder, 0, 1, 8, [(4, 9)])


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_leaving_early_leaves_no_threads(builder: examples.ExampleBuilder):
    def leave_early() -> int:
        batches = training_batches(builder, 0, 10**9, 32, [(0, 32)])
        next(batches)
        running = len(os.listdir("/proc/self/task"))  # noqa: PTH208
        batches.close()
        return running

    leave_early()  # what TensorFlow keeps for good is there from now on
    idle = threads_when_settled()
    assert leave_early() > idle
    for _ in range(5):
        leave_early()
    assert threads_when_settled() == idle


def test_leaving_early_does_not_finish_what_is_in_work(builder: examples.ExampleBuilder):
    made = []

    class Counting:
        examples_per_epoch = builder.examples_per_epoch

        def rows(self, examples_B: np.ndarray, /) -> dict[str, np.ndarray]:
            time.sleep(0.002)
            made.append(len(examples_B))
            return builder.rows(examples_B)

    batches = training_batches(Counting(), 0, 10**9, 4, [(0, 4)])
    next(batches)
    first_call = len(made)
    assert first_call > 100
    batches.close()
    assert len(made) < 1.5 * first_call


def threads_when_settled() -> int:
    tasks = pathlib.Path("/proc/self/task")
    counts = [-1, -2]
    while counts[-1] != counts[-2]:
        time.sleep(0.2)
        counts.append(len(list(tasks.iterdir())))
    return counts[-1]


def test_is_silent_and_ends_with_the_program():
    # In a process of its own, with nothing set, that ends while a batch is being built.
    program = """
import sys
import time
import numpy as np
from albert_jax.data import examples, pipeline, store
assert "tensorflow" not in sys.modules
class Slow(examples.ExampleBuilder):
    def rows(self, examples_B):
        time.sleep(0.05)
        return super().rows(examples_B)
words = examples.Vocabulary(9, 2, 3, 4, np.ones(9, bool), np.arange(9) < 5)
options = examples.ExampleOptions(16, 3, 0.15, 3, 0.1, 3, "sop", "split")
shard = store.Shard(np.full(40, 7, np.uint16), np.arange(0, 41, 5), np.array([0, 8]))
builder = Slow([shard], words, options)
list(pipeline.evaluation_batches(builder, 2, [(0, 2)]))
batches = pipeline.training_batches([pipeline.Stage(builder, 256, [(0, 256)])], 0, 10**9)
print(next(batches)["input_ids"].shape)
"""
    quiet = {"TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        env={name: value for name, value in os.environ.items() if name not in quiet},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "(256, 16)\n", "")
