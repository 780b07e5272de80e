"""Processes that share work on one machine.

In:  a task, and jobs that are small to pickle.
Out: results as jobs are finished; progress while they run.

No worker outlives its parent, and Ctrl-C is the parent's to handle.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from albert_jax import progress as progress_lib
from albert_jax.errors import UserError

# Told bytes and units done, as they are.
Advance = Callable[[int, int], None]


def parallel(
    task: Callable[[Any, Advance], Any],
    jobs: Sequence[Any],
    workers: int,
    progress: progress_lib.Progress,
    unit: str,
    if_killed: str = "give fewer --workers",
) -> Iterator[tuple[int, Any]]:
    """(index of the job, result) as jobs are finished; with one worker, in this process.

    Args:
        task: called with a job and where to tell bytes and units done.
        jobs: small things to pickle.
        workers: processes.
        progress: shows bytes, and units in its note.
        unit: what else is counted.
        if_killed: advice for when a worker was, most likely for its memory.

    Raises:
        UserError: a worker was killed from outside.
    """
    if workers == 1:
        units = 0

        def advance(size: int, more: int) -> None:
            nonlocal units
            units += more
            progress.advance(size, f"{units:,} {unit}")

        for index, job in enumerate(jobs):
            yield index, task(job, advance)
        return
    # Not forked: the parent may have threads, and macOS forbids it.
    context = multiprocessing.get_context("spawn")
    done = context.Array("q", 2)
    told = 0
    todo = collections.deque(enumerate(jobs))
    running: dict[concurrent.futures.Future[Any], int] = {}
    executor = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (done,))
    # A pipe to a worker that died is an error to report, not our end as it is on `| head`.
    with _ignoring(signal.SIGPIPE):
        try:
            while todo or running:
                # Processes are started here and inherit this: Ctrl-C is the parent's to handle.
                with _held_back(signal.SIGINT):
                    while todo and len(running) < 2 * workers:
                        index, job = todo.popleft()
                        running[executor.submit(_work, task, job)] = index
                finished, _ = concurrent.futures.wait(
                    running, 0.1, concurrent.futures.FIRST_COMPLETED
                )
                progress.advance(done[0] - told, f"{done[1]:,} {unit}")
                told = done[0]
                for future in finished:
                    yield running.pop(future), future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                f"a worker process was killed, most likely because memory ran out; {if_killed}."
            ) from None
        finally:
            for process in multiprocessing.active_children() if running else ():
                process.kill()
            executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """A signal waits; ignored, one that comes while processes start would be lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _ignoring(number: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only there can it be set, and only there are such signals handled
        return
    handler = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, handler)


_done: Any = None  # in a worker: bytes and units that all of them have done, shared


def _begin_worker(done: Any) -> None:
    global _done
    _done = done
    # Nobody else ends a worker whose parent was killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(task: Callable[[Any, Advance], Any], job: Any) -> Any:
    return task(job, _advance_shared)


def _advance_shared(size: int, units: int) -> None:
    with _done.get_lock():
        _done[0] += size
        _done[1] += units
