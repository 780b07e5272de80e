"""Saving and restoring a run through Orbax: asynchronous, atomic, the newest and the best kept.

A checkpoint has two parts: `params`, which evaluation and inference read alone, and `training`, the
rest of the state. A half-written one has a temporary name, or in a bucket lacks the object that is
written last, and is never taken for whole.
"""

import dataclasses
import logging
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from albert_jax import storage
from albert_jax.errors import UserError
from albert_jax.training import run_folder, step

_PARTS = ("params", "training")
_WHOLE = "commit_success.txt"  # what Orbax writes last into a checkpoint in a bucket


def newest_in(workdir: pathlib.Path) -> int | None:
    """The step of a run's newest whole checkpoint, without opening any; None where none is."""
    if place := run_folder.remote(workdir, run_folder.CHECKPOINTS):
        parts = [name.split("/") for name in storage.listing(place)]
        steps = [int(name[0]) for name in parts if name[1:] == [_WHOLE] and name[0].isdigit()]
        return max(steps, default=None)
    folder = workdir / run_folder.CHECKPOINTS
    if not folder.is_dir():
        return None
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    return max(steps, default=None)


def read_params(
    workdir: pathlib.Path, like: Any, number: int | None = None, best: bool = False
) -> tuple[Any, int]:
    """The parameters that a run saved, and the step they are of.

    Args:
        workdir: of the run.
        like: their shapes, dtypes and shardings.
        number: which checkpoint; the newest by default.
        best: the best by default, where any was judged.

    Raises:
        UserError: the run has no such checkpoint, or it does not fit.
    """
    if newest_in(workdir) is None:  # opening it would make the folder
        raise UserError(
            f"{run_folder.named(workdir)} has no checkpoint yet; albert_jax.train saves the first "
            "one."
        )
    with Checkpoints(workdir) as saved:
        if best and number is None and saved.best:
            number = saved.best[0]
        number = saved.chosen(number)
        return saved.restore_params(like, number), number


def write_params(workdir: pathlib.Path, params: Any, number: int) -> None:
    """Saves parameters alone, as `read_params` reads them: a model that came from elsewhere."""
    with Checkpoints(workdir) as saved:
        saved.save_params(params, number)


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Args:
        workdir: the run's folder; theirs is made when the first is saved.
        keep: how many of the newest stay; the best by its score stays besides.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 1) -> None:
        # Orbax tells its whole story at INFO and warns of what it then does right.
        logging.getLogger("absl").setLevel(logging.ERROR)
        if run_folder.remote(workdir):
            # What fails in a thread is told by whoever waits for it (`_guarded`), without traces;
            # by a filter, as others set the level anew.
            logging.getLogger("absl").addFilter(_is_critical)
            sys.excepthook = _without_late_callbacks
        self._folder, self._place = run_folder.checkpoints(workdir.resolve()), workdir
        self._remote = bool(run_folder.remote(workdir))
        self._scores: dict[int, float] = {}
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=_PARTS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(keep),
                        _KeptBest(lambda: self.best),
                    ]
                ),
                create=True,
            ),
        )
        self._whole = self._manager.latest_step()
        self._in_flight: int | None = None
        for number in self._manager.all_steps():
            score = self._metadata(number).get("score")
            if score is not None:
                self._scores[number] = score

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # To close it is to wait for the other processes, which an error may keep from coming, or
        # for a bucket that has gone away.
        if error is None or (jax.process_count() == 1 and not self._remote):
            self._manager.close()

    @property
    def newest(self) -> int | None:
        """The step of the newest whole checkpoint; None where there is none.

        One that is being saved counts from when it was waited for without an error, in all
        processes alike; Orbax counts it from the start.
        """
        return self._whole

    @property
    def steps(self) -> list[int]:
        """Of all whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def chosen(self, number: int | None) -> int:
        """The step of a whole checkpoint: `number` itself, or the newest.

        Raises:
            UserError: there is none.
        """
        number = self.newest if number is None else number
        if number not in self.steps:
            raise UserError(
                f"{run_folder.named(self._place)} has no checkpoint of step {number}; "
                f"there are: {self.steps}."
            )
        return number

    @property
    def best(self) -> tuple[int, float] | None:
        """The step and score of the kept checkpoint that was judged best, of equal ones the first;
        None if none was judged.
        """
        judged = [
            (self._scores[number], -number) for number in self.steps if number in self._scores
        ]
        if not judged:
            return None
        score, number = max(judged)
        return -number, score

    def seconds(self, number: int) -> dict[str, float]:
        """How long what led to checkpoint `number` took, by kind (see `goodput.Clock`)."""
        return dict(self._metadata(number).get("seconds", {}))

    def _metadata(self, number: int) -> dict[str, Any]:
        return dict(self._manager.metadata(number).custom_metadata or {})

    def save(
        self,
        state: step.TrainState,
        number: int,
        score: float | None,
        seconds: dict[str, float],
    ) -> None:
        """Starts to save, when what was started before is whole; returns as soon as the state may
        be overwritten.

        Args:
            state: what `number` steps made.
            number: the step; saving the same one again does nothing.
            score: how good an evaluation at this step found it; None if there was none.
            seconds: how long it all took, by kind.
        """
        if number in self._manager.all_steps():
            return
        self.wait()
        if score is not None and math.isfinite(score):
            self._scores[number] = score
        rest = {field: getattr(state, field) for field in _rest(state)}
        self._guarded(
            self._manager.save,
            number,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params), training=ocp.args.StandardSave(rest)
            ),
            custom_metadata={"seconds": seconds, "score": score},
        )
        self._in_flight = number

    def save_params(self, params: Any, number: int) -> None:
        """Saves parameters without the state of a training."""
        args = ocp.args.Composite(params=ocp.args.StandardSave(params))
        self._guarded(self._manager.save, number, args=args)
        self._in_flight = number
        self.wait()

    def wait(self) -> None:
        """Until everything that was started is on the disk."""
        self._guarded(self._manager.wait_until_finished)
        if self._in_flight is not None:
            self._whole, self._in_flight = self._in_flight, None

    def restore(self, like: step.TrainState, number: int) -> step.TrainState:
        """The state after `number` steps, in the shapes and shardings of `like`, whatever it was
        saved under.

        Raises:
            UserError: its arrays are not those of this model.
        """
        rest = {field: getattr(like, field) for field in _rest(like)}
        restored = self._restore(
            number,
            ocp.args.Composite(
                params=ocp.args.StandardRestore(like.params),
                training=ocp.args.StandardRestore(rest),
            ),
        )
        return step.TrainState(params=restored["params"], **restored["training"])

    def restore_params(self, like: Any, number: int) -> Any:
        """The parameters alone, for evaluation and inference."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(like))
        return self._restore(number, args)["params"]

    def _guarded(self, write: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Runs what writes; an earlier save that failed in the background is told of here."""
        try:
            write(*args, **kwargs)
        except (OSError, ValueError, RuntimeError, UserError) as error:
            self._in_flight = None  # Orbax raises only once
            if not self._remote and not isinstance(error, (OSError, ValueError)):
                raise
            newest = self.newest
            raise UserError(
                f"a checkpoint could not be written to {self._folder}: "
                f"{_reason(error)}. "
                + (f"The last good one is of step {newest}" if newest else "No other is there yet")
                + "; the same command again goes on."
            ) from error

    def _restore(self, number: int, args: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(number, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint {self._folder / str(number)} does not fit this model or is damaged: "
                f"{str(error).splitlines()[0]}"
            ) from error


@dataclasses.dataclass(frozen=True)
class _KeptBest(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint that `best` names, also one that was judged before a restart, which
    Orbax's own policy forgets.
    """

    best: Callable[[], tuple[int, float] | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether to keep each."""
        del context
        best = self.best()
        return [best is not None and info.step == best[0] for info in checkpoints]


def _is_critical(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL


def _without_late_callbacks(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """`sys.excepthook`, but for TensorStore's news of requests that nobody waits for any more."""
    if not (kind is RuntimeError and str(error) == "Event loop is closed"):
        sys.__excepthook__(kind, error, trace)


def _reason(error: Exception) -> str:
    """An error's first line, without the specification that TensorStore appends."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.partition(" [tensorstore_spec=")[0].rstrip(".")


def _rest(state: step.TrainState) -> list[str]:
    return [field for field in state.__dataclass_fields__ if field != "params"]
