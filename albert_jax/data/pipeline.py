"""Batches through tf.data: a range of steps, a map that builds, a prefetch that keeps ahead.

In:  a `Builder`, which steps (or the whole split once), the batch size over all hosts, and which
     rows of each batch this host needs; for training, by stages of a curriculum.
Out: a generator of batches as `Builder.rows` makes them; the arrays are not copied.

Promise: the examples of a run are taken one batch behind the other, so that in a run of one batch
size batch b holds examples [b * batch_size, (b + 1) * batch_size), and step s takes batch s (where
batches are skipped, the s-th of the others), whatever the hosts and the step it was begun at.
Closing the generator early ends its threads, and what the builder raises comes out as it is.
TensorFlow is imported when the first batch is asked for, and kept off accelerators.
"""

import atexit
import bisect
import contextlib
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import numpy as np

_MOST_THREADS = 4  # each makes over 100,000 examples a second: more would only hold more memory
_CALLS_AHEAD = 2
_ROWS_A_CALL = 2048  # several small batches are made in one call, a large one alone
_OPEN: weakref.WeakSet[Generator[dict[str, np.ndarray], None, None]] = weakref.WeakSet()


class Builder(Protocol):
    """What makes the examples of a run: `examples.ExampleBuilder`, or what has its surface."""

    @property
    def examples_per_epoch(self) -> int:
        """N."""
        ...

    def rows(self, examples_B: np.ndarray, /) -> dict[str, np.ndarray]:
        """The numbered examples, one a row; a negative number makes a row of padding."""
        ...


@dataclasses.dataclass(frozen=True)
class Stage:
    """Batches of a run that are made alike.

    Attributes:
        builder: makes the examples.
        batch_size: B, examples a step over all hosts.
        rows: ranges [start, stop) of a batch's rows that this host needs, in the order in which
            they are wanted; `[(0, batch_size)]` for all of them.
        first_batch: number of the first batch, from 0.
        first_example: number of its first example: how many all batches before it hold.
    """

    builder: Builder
    batch_size: int
    rows: Sequence[tuple[int, int]]
    first_batch: int = 0
    first_example: int = 0


def training_batches(
    stages: Sequence[Stage], first_step: int, last_step: int, skipped: Sequence[int] = ()
) -> Generator[dict[str, np.ndarray], None, None]:
    """This host's rows of the batches of steps [first_step, last_step).

    Args:
        stages: of the run, in order; the first has its first batch.
        first_step: number of the first step; 0 begins a run, any other goes on with it.
        last_step: number of the step to end before.
        skipped: numbers of batches that are left out.
    """
    rows = [_numbers(stage.rows, stage.batch_size) for stage in stages]
    begins = [stage.first_batch for stage in stages]

    def examples_of(step: int) -> tuple[Builder, np.ndarray]:
        batch = batch_number(step, skipped)
        place = bisect.bisect_right(begins, batch) - 1
        stage = stages[place]
        first = stage.first_example + (batch - stage.first_batch) * stage.batch_size
        return stage.builder, first + rows[place]

    return _stream(examples_of, first_step, last_step)


def batch_number(step: int, skipped: Sequence[int]) -> int:
    """Which batch a step takes: the step-th, from 0, of those that are not skipped."""
    number = step
    for left_out in sorted(skipped):
        number += left_out <= number
    return number


def evaluation_batches(
    builder: Builder,
    batch_size: int,
    rows: Sequence[tuple[int, int]],
    limit_batches: int | None = None,
) -> Generator[dict[str, np.ndarray], None, None]:
    """This host's rows of the whole split, once: each chunk as it is in epoch 0.

    The last batch is filled up with rows of zeros (`attention_mask` 0 everywhere), so that every
    host sees the same number of batches, ceil(N / batch_size) or `limit_batches` if that is less.
    Arguments as in `Stage`.
    """
    rows_b = _numbers(rows, batch_size)
    size = builder.examples_per_epoch
    batches = -(-size // batch_size)

    def examples_of(step: int) -> tuple[Builder, np.ndarray]:
        examples_b = step * batch_size + rows_b
        return builder, np.where(examples_b < size, examples_b, -1)

    last_step = batches if limit_batches is None else min(batches, limit_batches)
    return _stream(examples_of, 0, last_step)


def _numbers(rows: Sequence[tuple[int, int]], batch_size: int) -> np.ndarray:
    for start, stop in rows:
        if not 0 <= start <= stop <= batch_size:
            raise ValueError(f"rows [{start}, {stop}) are not in a batch of {batch_size}.")
    return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in rows])


def _stream(
    examples_of: Callable[[int], tuple[Builder, np.ndarray]],
    first_step: int,
    last_step: int,
) -> Generator[dict[str, np.ndarray], None, None]:
    stream = _batches(examples_of, first_step, last_step)
    _OPEN.add(stream)
    return stream


@atexit.register
def _close_all() -> None:
    # Later, Python would end tf.data's threads inside `build`, and TensorFlow, which waits for
    # them when the stream is deleted, would wait for ever.
    for stream in list(_OPEN):
        stream.close()


def _batches(
    examples_of: Callable[[int], tuple[Builder, np.ndarray]],
    first_step: int,
    last_step: int,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields the batches of steps [first_step, last_step), made ahead in tf.data's threads.

    What passes through TensorFlow is the numbers of the calls alone: arrays would cost it more. A
    call costs it some 150 us, in which the builder makes over a hundred examples.
    """
    if first_step >= last_step:
        return
    tf = tensorflow()
    steps = max(1, _ROWS_A_CALL // max(len(examples_of(first_step)[1]), 1))
    made: dict[int, tuple[list[dict[str, np.ndarray]], Exception | None]] = {}
    closed = threading.Event()

    def build(call: np.ndarray) -> np.ndarray:
        first, batches, failure = first_step + int(call) * steps, [], None
        try:
            for step in range(first, min(first + steps, last_step)):
                if closed.is_set():
                    break
                builder, examples_b = examples_of(step)
                batches.append(builder.rows(examples_b))
        except Exception as error:  # TensorFlow would pass on its text alone
            failure = error
        made[int(call)] = batches, failure
        return call

    threads = max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 2))
    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    dataset = tf.data.Dataset.range(-(-(last_step - first_step) // steps))
    dataset = dataset.map(
        lambda call: tf.numpy_function(build, [call], tf.int64),
        num_parallel_calls=threads,
        deterministic=True,
    )
    dataset = dataset.prefetch(_CALLS_AHEAD).with_options(options)
    calls = iter(dataset)
    try:
        for call in calls:
            batches, failure = made.pop(int(call))
            yield from batches
            if failure is not None:
                raise failure
    finally:
        closed.set()
        del calls  # ends the threads, and waits for them


def tensorflow() -> Any:
    """TensorFlow, quiet and kept off accelerators; all of `data` that needs it takes it here."""
    # Libraries should be silent on a user's terminal; a value that the user has set wins.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    # Else TensorFlow would take the memory of the accelerator that trains. It refuses where the
    # program has used it before us, and so has decided this itself.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    return tf
