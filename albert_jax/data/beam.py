"""The work of `preparation` on many machines, through Apache Beam.

In:  a task, its jobs (such as `shards.complete` and `ShardJob`s), and a `Cluster`: a runner of Beam
     by name, and its options.
Out: what the task writes, and a record of each job, in the folder of the jobs, which all machines
     see.

Only the jobs travel through Beam: a machine reads its stretch of the input and writes its shard
itself, by the same function as a local process. Beam may run a job twice, or at two places at once;
the files are the same ones and appear whole, so that does no harm. A shard that is there already is
kept, so a job that was killed goes on.

Nothing of Beam is imported before `each` is called.
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from albert_jax import progress as progress_lib
from albert_jax.data.workers import Advance
from albert_jax.errors import UserError

RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")

_LOOK_EVERY_SECS = 2.0  # at what is finished; a listing of the folder
_FAILED = ".failed"
# The system's word for it, as it comes back from a machine in the text of a traceback.
_SYSTEM_ERROR = re.compile(r"OSError: (\[Errno \d+\] .*?)(?: \[while running|\\n|\n|$)")


class _Unit(Protocol):
    @property
    def size(self) -> int: ...


class Job(Protocol):
    """A stretch of the input; its record is to be `folder/name.json`, written last."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def folder(self) -> Path: ...  # noqa: D102
    @property
    def units(self) -> Sequence[_Unit]: ...  # noqa: D102


# Called with a job and where to tell bytes and documents done; a function of a module, since other
# machines find it by its name.
Task = Callable[[Any, Advance], Any]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where jobs run.

    Attributes:
        runner: one of `RUNNERS`.
        options: what Beam gets, as it stands on a command line of Beam's own.
    """

    runner: str
    options: tuple[str, ...] = ()

    def check(self, inputs: Sequence[str], output: str) -> None:
        """Raises UserError: Beam is not installed, or the machines would not see a path."""
        if self.runner == "DataflowRunner":
            for flag, paths in (("input", inputs), ("output", (output,))):
                for path in paths:
                    if "://" not in path:
                        raise UserError(
                            f"--{flag}={path} is on this machine, where the workers of Dataflow do "
                            "not see it; put it into a bucket: gs://BUCKET/…"
                        )
        _beam(self.runner)


def each(
    task: Task, jobs: Sequence[Job], cluster: Cluster, progress: progress_lib.Progress
) -> list[dict[str, Any]]:
    """The records that a task makes of the jobs, in order.

    Raises:
        UserError: bad input, named as a local process names it; options that the runner refuses;
            a full disk; workers that do not see the folder.
    """
    if not jobs:
        return []
    beam = _beam(cluster.runner)
    # A runner elsewhere has news: its job's address, machines that come and go. Here it has but the
    # tracebacks of errors that are told below.
    here = cluster.runner == "DirectRunner"
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL if here else logging.INFO)
    for job in jobs:
        _failed_path(job).unlink(missing_ok=True)
    try:
        pipeline = beam.Pipeline(options=_pipeline_options(cluster))
        _ = (
            pipeline
            | "Shards" >> beam.Create(list(jobs))
            | "Spread" >> beam.Reshuffle()
            | "Write" >> beam.Map(_work_there, task)
        )
    except ValueError as error:
        raise UserError(f"--beam_options: {cluster.runner} refuses: {error}") from None
    with _watching(jobs, progress):
        try:
            _run(pipeline)
        except Exception as error:
            _explain(jobs, cluster, error)
            raise
    _explain(jobs, cluster, None)
    return [json.loads(_record_path(job).read_bytes()) for job in jobs]


def _work_there(job: Any, task: Any) -> None:
    """What a machine does with a job. (Beam would check types that say more at run time.)"""
    if not job.folder.is_dir():
        raise UserError(
            f"{job.folder} is not seen from {socket.gethostname()}; --output must be at a place "
            "that all machines share."
        )
    count = _beam_counters()
    try:
        task(job, lambda size, documents: count(bytes=size, documents=documents))
    except UserError as error:
        # Not raised: to try again would not mend it, and the others shall finish.
        _failed_path(job).write_text(str(error), encoding="utf-8")


def _beam_counters() -> Any:
    metrics = importlib.import_module("apache_beam.metrics").Metrics

    def count(**amounts: int) -> None:
        for name, amount in amounts.items():
            metrics.counter("albert_jax", name).inc(amount)

    return count


def _run(pipeline: Any) -> None:
    result = pipeline.run()
    try:
        result.wait_until_finish()
    except BaseException:
        # Ctrl-C here must end the machines' work too: they would write on, unseen.
        with contextlib.suppress(Exception):
            result.cancel()
        raise


def _explain(jobs: Sequence[Job], cluster: Cluster, error: Exception | None) -> None:
    """Raises UserError for a failure that has a known reason."""
    failed = [path.read_text(encoding="utf-8") for path in map(_failed_path, jobs) if path.exists()]
    if failed:
        more = f"\nShards that failed so: {len(failed)} of {len(jobs)}." if len(failed) > 1 else ""
        raise UserError(f"{failed[0]}{more}")
    if error is None:
        return
    said = str(error)
    if said.startswith("KeyboardInterrupt"):  # it met the runner on this machine at work
        raise KeyboardInterrupt from None
    if found := re.search(r"UserError: (.*?)(?: \[while running|\\n|\n|$)", said):
        raise UserError(found[1]) from None
    if found := _SYSTEM_ERROR.search(said):
        raise UserError(
            f"a worker of {cluster.runner} could not write or read: {found[1]}. If the disk is "
            "full: a store takes about half the room of its text."
        ) from None
    if isinstance(error, ValueError):  # what a runner finds wrong before it begins
        raise UserError(f"--beam_options: {cluster.runner} refuses: {said}") from None


@contextlib.contextmanager
def _watching(jobs: Sequence[Job], progress: progress_lib.Progress) -> Iterator[None]:
    """Shows what is finished, by the records that appear: so it is the same for all runners."""
    sizes = {_record_path(job).name: sum(unit.size for unit in job.units) for job in jobs}
    total, folder = len(sizes), jobs[0].folder
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_EVERY_SECS):
            for name in [path.name for path in folder.glob("*-of-*.json") if path.name in sizes]:
                progress.advance(sizes.pop(name), f"{total - len(sizes):,} shards")
            progress.advance(0)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _record_path(job: Job) -> Path:
    return job.folder / f"{job.name}.json"


def _failed_path(job: Job) -> Path:
    return job.folder / f"{job.name}{_FAILED}"


def _beam(runner: str) -> Any:
    """The package.

    Raises:
        UserError: it is not installed, or not all of it that the runner takes.
    """
    logging.disable(logging.WARNING)  # of what else could be installed
    try:
        beam = importlib.import_module("apache_beam")
        if runner == "DataflowRunner":
            importlib.import_module("apitools.base.py")
    except ImportError as error:
        extra = "beam" if (error.name or "").startswith("apache_beam") else "dataflow"
        raise UserError(
            f"--runner={runner} needs {error.name}: pip install 'albert-jax[{extra}]'"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    return beam


def _pipeline_options(cluster: Cluster) -> Any:
    flags = [f"--runner={cluster.runner}"]
    if cluster.runner == "DirectRunner":
        # Keeps Beam from downloading a program, Prism, and running that instead; there are no
        # triggers here, safe or not.
        flags.append("--allow_unsafe_triggers")
    options = importlib.import_module("apache_beam.options.pipeline_options")
    return options.PipelineOptions([*flags, *cluster.options])
