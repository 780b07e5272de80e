"""The training loop, top to bottom: restore, step, log, evaluate, save, stop.

The host runs a step or two ahead of the device, and waits for it only where a line is logged, the
split evaluated or a checkpoint saved. A run that is killed anywhere and started again, on whatever
processes and devices, goes on as if nothing had happened: the state holds everything, and its step
is the place in the data. A batch whose loss is not finite is left out for good.

All processes of a run go through this together. What depends on a clock or a signal is process 0's
to decide (`hosts.order`); all else follows from the state, which is the same everywhere.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from albert_jax import curriculum
from albert_jax.config import AUTO
from albert_jax.data import pipeline
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.progress import Progress
from albert_jax.training import (
    checkpoint,
    compilation_cache,
    fitting,
    goodput,
    hosts,
    optimizer,
    program,
    run_folder,
    sharding,
    step,
    telemetry,
)
from albert_jax.training import workdir as workdir_lib
from albert_jax.training.compiler_options import compiler_options

_SECONDS_A_PICTURE = 30.0  # at least, but for the last: drawing takes seconds
_STEPS_AHEAD = 2  # of the device; more would only be longer to wait for when the run must stop

TrainStep = Callable[..., step.TrainState]
Batches = Generator[dict[str, np.ndarray], None, None]


class Course(Protocol):
    """What a run is taught and judged by: all that the loop asks of pretraining or of a task.

    Attributes:
        tokenizer: the workdir keeps it.
        evaluation_batches: how many of the batches of `held_out`; None: all.
    """

    tokenizer: Tokenizer
    evaluation_batches: int | None

    @property
    def held_out(self) -> pipeline.Builder:
        """What is evaluated, as `pipeline.evaluation_batches` wants it."""
        ...

    def builder(self, stage: curriculum.Stage) -> pipeline.Builder:
        """What makes the examples of a stage of the run."""
        ...

    def abstract_batch(self, stage: curriculum.Stage) -> Any:
        """Shapes and shardings of a stage's batches, if they are alike; else None."""
        ...

    def evaluate(
        self, program: program.Program, params: Any, batches: Iterable[Mapping[str, np.ndarray]]
    ) -> dict[str, dict[str, float]]:
        """Figures by split; "validation" is the one that is judged."""
        ...

    def score(self, figures: Mapping[str, float]) -> float:
        """How good the judged split's figures are; more is better."""
        ...

    def note(self, means: Mapping[str, float]) -> str:
        """The means of a few steps, for the progress line."""
        ...

    def summary(self, figures: Mapping[str, Mapping[str, float]], number: int) -> str:
        """An evaluation after `number` steps, as a person reads it."""
        ...

    def draw(self, workdir: pathlib.Path) -> None:
        """Draws the run's report."""
        ...

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Floating-point operations of a training step on one row of a batch."""
        ...


def train(
    run: program.Program,
    course: Course,
    workdir: pathlib.Path,
    processes: hosts.Hosts,
    profile: tuple[int, int] | None = None,
    started: float | None = None,
    start: Callable[[step.TrainState], step.TrainState] | None = None,
) -> bool:
    """Trains to `train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
        run: the compiled program; its config is the resolved one.
        course: what it is taught.
        workdir: see the workdir contract: config.json, checkpoints/, metrics.jsonl, tensorboard/,
            report/. All processes see it.
        processes: that make this run together.
        profile: the first and the last step, from 1, that a trace in `workdir`/profile shows.
        started: when this process began, in `time.monotonic()`.
        start: what makes of a new state the one to begin with; a run that goes on has its own.

    Returns:
        True when all steps are done; False when a signal stopped it, its state saved.

    Raises:
        UserError: too many losses or gradients that are not finite, a checkpoint that does not fit,
            another run's workdir, a full disk.
    """
    clock = goodput.Clock(started)
    processes.outlook = lambda: _outlook(_newest(workdir), processes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.stop_signals())
        if processes.leader:
            stack.enter_context(workdir_lib.prepare(workdir, run.config))
            workdir_lib.write_tokenizer(course.tokenizer, workdir)
        workdir_lib.check_shared(workdir, run.config, processes)
        minutes = run.config.train.stall_minutes
        stack.enter_context(goodput.Watchdog(clock, minutes, workdir, processes))
        saved = stack.enter_context(checkpoint.Checkpoints(workdir, run.config.checkpoint.keep))
        return _Loop(run, course, workdir, saved, processes, clock, profile, start).run()


class _Loop:
    """The state of one call of `train`."""

    def __init__(
        self,
        run: program.Program,
        course: Course,
        workdir: pathlib.Path,
        saved: checkpoint.Checkpoints,
        processes: hosts.Hosts,
        clock: goodput.Clock,
        profile: tuple[int, int] | None,
        start: Callable[[step.TrainState], step.TrainState] | None,
    ) -> None:
        self._program, self._config, self._workdir = run, run.config, workdir
        self._saved, self._hosts, self._clock = saved, processes, clock
        self._profile = profile if processes.leader else None
        self._tracing, self._start, self._course = False, start, course
        self._drawn_at = -math.inf
        self._frozen = run.frozen()
        self._stages = run.config.stages
        self._parts = [
            pipeline.Stage(
                course.builder(stage),
                stage.global_batch_size,
                sharding.local_rows(run.batch_sharding, stage.global_batch_size),
                stage.first_batch,
                stage.first_example,
            )
            for stage in self._stages
        ]
        self._rate = optimizer.learning_rate(run.config.optimizer, run.config.train.steps)
        peak = telemetry.peak_flops(run.mesh.devices.flat[0])
        self._peak = None if peak is None else peak * run.mesh.size
        self._compiled: dict[tuple[int, ...], TrainStep] = {}
        self._skipped = processes.share("skipped", lambda: workdir_lib.read_skipped(workdir))
        self._cache: compilation_cache.Cache | None = None
        if jax.default_backend() != "cpu":  # one CPU's programs would not run on every other
            kept = run_folder.named(workdir / compilation_cache.FOLDER)
            directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", kept)
            self._cache = compilation_cache.Cache(directory)
        # A copy of the step outlives the state that the next step takes over.
        self._copy = jax.jit(lambda number: number + 0)
        self._in_flight: collections.deque[jax.Array] = collections.deque()

    def run(self) -> bool:
        config, total = self._config, self._config.train.steps
        state, number = self._restore()
        evaluation_owed = self._open_log(number)
        self._open_batches(number)
        try:
            if self._finished(number) and not evaluation_owed:
                steps = f"all {total} steps" if number >= total else f"{number} of {total} steps"
                self._progress.write(
                    f"{run_folder.named(self._workdir)} is trained already: {steps}."
                )
                return True
            if number:
                self._progress.write(f"goes on after step {number}")
            if self._profile and number >= self._profile[0]:
                self._progress.write(f"--profile: step {self._profile[0]} is done already")
            if number < total:
                self._compile_first(number)
            self._last_save = time.monotonic()
            self._start_window(number)
            self._clock.turn_to("step")
            if evaluation_owed:
                self._evaluate(state, number)
            while not self._finished(number) and not self._hosts.stopping:
                number += 1
                batch = self._next_batch(number - 1)
                train_step = self._step_for(batch, state, number - 1)
                with self._traced(number):
                    state = train_step(state, batch, *self._frozen)
                    self._keep_near(state)
                order = self._hosts.order(self._save_due)
                log = number % config.log.every_steps == 0 or number == total
                evaluate = _due(number, config.eval.every_steps) or number == total
                save = order is not hosts.Order.GO or number == total
                save = save or _due(number, config.checkpoint.every_steps)
                if not (log or evaluate or save):
                    continue
                if (bad_step := int(state.bad_step)) >= 0:
                    state, number = self._roll_back(bad_step)
                    continue
                self._hosts.settled()
                if log:
                    self._log_window(state, number)
                evaluated = self._evaluate(state, number) if evaluate else None
                best = self._is_best(evaluated)
                if save or best or self._hosts.stopping or self._finished(number):
                    self._save(state, number, evaluated)
            with self._clock.during("checkpoint"):
                self._saved.wait()
            if self._hosts.stopping:
                saved = f"saved step {self._saved.newest or 0} of {total}"
                self._progress.write(
                    f"{self._hosts.stop_asked}: {saved}; the same command goes on from there."
                )
            self._progress.write(self._clock.summary() + self._skipped_note())
            return not self._hosts.stopping
        finally:
            self._progress.close()
            if self._log:
                self._log.close()
            self._stream.close()

    def _finished(self, number: int) -> bool:
        """Whether all steps are done, or nothing has become better for long enough."""
        patience = self._config.eval.patience
        since_best = len(self._scores) - 1 - _last_best(self._scores)
        worn_out = 0 < patience <= since_best
        return number >= self._config.train.steps or worn_out

    def _restore(self) -> tuple[step.TrainState, int]:
        """The newest checkpoint's state, or a new one, and how many steps made it."""
        if number := self._saved.newest or 0:
            return self._saved.restore(self._program.abstract_state, number), number
        state, teacher = self._program.init(), self._program.teacher
        if teacher and self._config.distillation.layers:
            params = teacher.started(state.params, self._config)
            state = dataclasses.replace(state, params=params)
        if self._start:
            state = self._start(state)
        return state, int(state.step)

    def _open_log(self, number: int) -> bool:
        """Begins to log after step `number`; whether that step's evaluation was broken off."""
        total, rows = self._config.train.steps, []
        owed = False
        self._log: telemetry.MetricsLog | None = None
        if self._hosts.leader:
            rows = list(telemetry.read_metrics(self._workdir / "metrics.jsonl"))
            newest = self._saved.newest  # none where a run begins with --init
            seconds = self._saved.seconds(newest) if newest else {}
            self._clock.rewind(seconds, goodput.read_fields(rows[-1] if rows else {}))
            self._log = telemetry.MetricsLog(self._workdir, number)
            evaluated = any(row["step"] == number and "split" in row for row in rows)
            due = number and _due(number, self._config.eval.every_steps)
            owed = bool((due or number == total) and not evaluated)
        stream = None if self._hosts.leader else open(os.devnull, "w")  # noqa: PTH123, SIM115
        self._progress = Progress("train", total, "step", initial=number, stream=stream)
        judged = [[row["step"], row["score"]] for row in rows if "score" in row]
        judged = self._hosts.share("scores", lambda: judged)
        self._scores = [(made, score) for made, score in judged if made <= number]
        return self._hosts.share("evaluation owed", lambda: owed)

    def _open_batches(self, number: int) -> None:
        """The batches after step `number` come next."""
        steps = self._config.train.steps
        self._stream = pipeline.training_batches(self._parts, number, steps, self._skipped)
        self._batches: Iterator[dict[str, np.ndarray]] = self._stream

    def _stage(self, number: int) -> curriculum.Stage:
        """The stage that the batch after `number` steps belongs to."""
        batch = pipeline.batch_number(number, self._skipped)
        return curriculum.stage_of(self._stages, batch)

    def _step_for(
        self, batch: Mapping[str, jax.Array], state: step.TrainState, number: int
    ) -> TrainStep:
        """The compiled step for batches of this shape; `state` is what `number` steps made."""
        if (shape := batch["input_ids"].shape) not in self._compiled:
            abstract = {
                key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                for key, x in batch.items()
            }
            self._compile(abstract, self._stage(number), lambda: self._save_good(state, number))
        return self._compiled[shape]

    def _compile_first(self, number: int) -> None:
        """Compiles the step for the batch after `number` steps, if its shape is known before it is
        made.
        """
        stage = self._stage(number)
        batch = self._course.abstract_batch(stage)
        if batch is None:
            return

        def make_batch() -> None:
            self._batches = itertools.chain([next(self._stream)], self._stream)

        self._compile(batch, stage, meanwhile=make_batch)

    def _compile(
        self,
        batch: Mapping[str, Any],
        stage: curriculum.Stage,
        before_leaving: Callable[[], None] = lambda: None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Compiles the step for batches like this one. A run that must stop does not wait for it,
        and ends here.
        """
        began = time.monotonic()
        with self._clock.during("compile"):
            compiled = _in_background(lambda: self._fitted_step(batch, stage))
            meanwhile()
            while not compiled.done() and not self._hosts.stop_asked:
                concurrent.futures.wait([compiled], timeout=0.2)
            if self._hosts.order() is hosts.Order.STOP:
                before_leaving()
                self._progress.write(
                    f"{self._hosts.stop_asked}: stopped while compiling; the same command goes on "
                    f"after step {self._saved.newest or 0}."
                )
                self._hosts.leave()
            train_step, notes = compiled.result()
            self._hosts.meet("compiled")
        shape = batch["input_ids"].shape
        what = ""
        if len(self._stages) > 1:
            what = f" for {shape[0]} sequences of {shape[-1]}"
        elif self._course.abstract_batch(stage) is None:
            what = f" for length {shape[-1]}"
        self._progress.write(f"compiled{what} in {time.monotonic() - began:.1f} s{notes}")
        self._compiled[shape] = train_step

    def _fitted_step(
        self, batch: Mapping[str, Any], stage: curriculum.Stage
    ) -> tuple[TrainStep, str]:
        """The step, compiled with whatever the config leaves open, and what to say of it."""
        config, mesh, cache = self._config.at(stage), self._program.mesh, self._cache
        device = mesh.local_devices[0]
        limit, options = fitting.memory_limit(device), compiler_options(device.device_kind)
        left_open = config.train.microbatch_size == AUTO or config.model.remat == "auto"
        try:
            if left_open:
                fitted = fitting.fit(config, mesh, limit, options, cache, batch=batch)
            else:
                whole_run = config == self._config
                run = self._program if whole_run else program.build(config, mesh)
                fitted = fitting.compile_program(run, limit, options, cache, batch)
        except fitting.DoesNotFitError as miss:
            raise UserError(
                f"the training step {miss}; give train.microbatch_size=auto and "
                "model.remat=auto, a smaller train.microbatch_size, or model.remat=full."
            ) from None
        chosen, notes = fitted.run.config, ""
        if left_open:
            size = chosen.train.microbatch_size or "the whole share"
            notes += f", train.microbatch_size={size}, model.remat={chosen.model.remat}"
        if cache is not None:
            notes += f"; {cache.account(chosen, mesh)}"
        return fitted.compiled, notes

    def _next_batch(self, number: int) -> dict[str, jax.Array]:
        """The batch after `number` steps."""
        batch_size = self._stage(number).global_batch_size
        with self._clock.during("data_wait"):
            batch = next(self._batches)
        self._window_examples += batch_size
        self._window_flops += self._course.flops(batch) * batch_size
        return sharding.to_global(batch, self._program.batch_sharding, batch_size)

    def _keep_near(self, state: step.TrainState) -> None:
        """Waits until the device is only _STEPS_AHEAD behind."""
        self._in_flight.append(self._copy(state.step))
        if len(self._in_flight) > _STEPS_AHEAD:
            jax.block_until_ready(self._in_flight.popleft())
        self._clock.moved()

    def _roll_back(self, bad_step: int) -> tuple[step.TrainState, int]:
        """Leaves out the batch of a step that was not finite; back to the newest checkpoint."""
        with self._clock.during("restart"):
            self._saved.wait()
            good = self._saved.newest or 0
            self._skip(bad_step)
            self._in_flight.clear()
            state, number = self._restore()
            self._scores = [(made, score) for made, score in self._scores if made <= number]
            self._stream.close()
            self._open_batches(number)
            if self._log:
                self._log.close()
                self._log = telemetry.MetricsLog(self._workdir, number)
                self._clock.rewind(self._saved.seconds(good) if good else {})
        self._progress.write(
            f"loss or gradient of step {bad_step + 1} is not finite: goes back to step {number}, "
            f"without batch {self._skipped[-1]}"
        )
        self._progress.advance(number - self._window_first)
        self._start_window(number)
        return state, number

    def _skip(self, bad_step: int) -> None:
        """Adds the batch of a step, from 0, to those that are left out for ever.

        Raises:
            UserError: it is one too many.
        """
        number = pipeline.batch_number(bad_step, self._skipped)
        if len(self._skipped) < self._config.train.max_skipped_batches:
            self._skipped.append(number)
            if self._hosts.leader:
                workdir_lib.write_skipped(self._workdir, self._skipped)
            return
        good = self._saved.newest
        where = (
            f"the last good checkpoint is step {good}" if good else "no checkpoint was saved yet"
        )
        left_out = ", ".join(map(str, self._skipped)) or "none"
        raise UserError(
            f"loss or gradient of step {bad_step + 1} is not finite; {where} in "
            f"{run_folder.named(self._workdir / run_folder.CHECKPOINTS)}. "
            f"Batches left out before: {left_out}; "
            f"train.max_skipped_batches={self._config.train.max_skipped_batches} allows no more. "
            "Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or train with "
            "model.dtype=float32, in another workdir."
        )

    def _skipped_note(self) -> str:
        return f"; {len(self._skipped)} batches left out" if self._skipped else ""

    def _start_window(self, number: int) -> None:
        """Begins the time of the next logged line."""
        self._window_first, self._window_spent = number, self._clock.seconds()
        self._window_examples, self._window_flops = 0, 0.0

    def _log_window(self, state: step.TrainState, number: int) -> None:
        window, window_steps = jax.device_get((state.window, state.window_steps))
        steps = max(number - self._window_first, 1)
        spent = self._clock.seconds()
        waited = spent["data_wait"] - self._window_spent["data_wait"]
        seconds = (spent["step"] - self._window_spent["step"] + waited) / steps
        means = {name: float(window[name]) / int(window_steps) for name in self._program.metrics}
        rate = self._window_flops / (seconds * steps)
        values: dict[str, float | None] = {
            **means,
            "learning_rate": float(self._rate(number)),
            "examples_per_second": self._window_examples / (seconds * steps),
            "step_seconds": seconds,
            "data_wait_seconds": waited / steps,
            "model_flops_utilization": None if self._peak is None else rate / self._peak,
            **self._clock.fields(),
        }
        if len(self._stages) > 1:
            stage = self._stage(number - 1)
            values["max_seq_length"] = stage.max_seq_length
            values["global_batch_size"] = stage.global_batch_size
        if self._log:
            self._log.write(number, values)
        self._progress.advance(
            steps, f"{self._course.note(means)}, {values['examples_per_second']:.0f} examples/s"
        )
        self._start_window(number)

    def _evaluate(self, state: step.TrainState, number: int) -> dict[str, float] | None:
        """The judged split's figures; None where the run has to stop before they are there."""
        course, size = self._course, self._config.train.global_batch_size
        rows = sharding.local_rows(self._program.batch_sharding, size)
        batches = pipeline.evaluation_batches(
            course.held_out, size, rows, course.evaluation_batches
        )
        with self._clock.during("evaluation"), contextlib.closing(batches):
            try:
                found = course.evaluate(self._program, state.params, self._until_stopped(batches))
            except _Stopped:
                return None
            judged = found["validation"]
            judged["score"] = course.score(judged)
            self._scores.append((number, judged["score"]))
            if self._log:
                for split, figures in found.items():
                    skipped = {"skipped_batches": len(self._skipped), **self._clock.fields()}
                    self._log.write(number, {**figures, **skipped}, split=split)
                if self._finished(number) or time.monotonic() - self._drawn_at > _SECONDS_A_PICTURE:
                    course.draw(self._workdir)
                    self._drawn_at = time.monotonic()
        text = course.summary(found, number) + self._skipped_note()
        self._progress.write(f"step {number}, validation: {text}")
        return judged

    def _until_stopped(self, batches: Batches) -> Iterator[dict[str, np.ndarray]]:
        self._hosts.change_pace()
        for batch in batches:
            if self._hosts.order() is hosts.Order.STOP:
                raise _Stopped
            self._clock.moved()
            yield batch
        self._hosts.change_pace()

    def _is_best(self, evaluated: dict[str, float] | None) -> bool:
        if evaluated is None or not math.isfinite(evaluated["score"]):
            return False
        return _last_best(self._scores) == len(self._scores) - 1

    def _flush(self) -> None:
        """Sees to it that what was written is where the run lies.

        Raises:
            UserError: it cannot be written there.
        """
        try:
            run_folder.flush(self._workdir)
        except UserError as error:
            raise UserError(f"{error} {_outlook(self._saved.newest, self._hosts)}.") from error

    def _save_due(self) -> bool:
        minutes = self._config.checkpoint.every_minutes
        return minutes > 0 and time.monotonic() - self._last_save >= 60.0 * minutes

    def _save(
        self, state: step.TrainState, number: int, evaluated: dict[str, float] | None
    ) -> None:
        with self._clock.during("checkpoint"):
            score = None if evaluated is None else evaluated["score"]
            self._saved.wait()  # first, so that what fails next knows which the last good one is
            self._flush()  # a run that goes on from here has all lines up to here
            self._saved.save(state, number, score, self._clock.seconds())
        self._last_save = time.monotonic()

    def _save_good(self, state: step.TrainState, number: int) -> None:
        """Saves what is not saved yet, if it is sound, and waits until it is."""
        if int(state.bad_step) < 0 and number > (self._saved.newest or 0):
            self._save(state, number, None)
            self._saved.wait()

    @contextlib.contextmanager
    def _traced(self, number: int) -> Iterator[None]:
        """A step, as --profile shows it where it is one of those that it asks for."""
        first, last = self._profile or (0, 0)
        if number == first and not self._tracing:
            jax.profiler.start_trace(self._workdir / "profile")
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == last and self._tracing:
            jax.block_until_ready(list(self._in_flight))
            jax.profiler.stop_trace()
            self._tracing = False
            self._progress.write(
                f"steps {first} to {last} are traced: tensorboard "
                f"--logdir={run_folder.named(self._workdir / 'profile')}"
            )


def _last_best(scores: Sequence[tuple[int, float]]) -> int:
    """Which of the (step, score) has the highest finite score, the first such; -1: none."""
    finite = [(score, -place) for place, (_, score) in enumerate(scores) if math.isfinite(score)]
    return -max(finite)[1] if finite else -1


class _Stopped(Exception):  # noqa: N818
    """The run was ordered to stop while it evaluated."""


def _outlook(newest: int | None, processes: hosts.Hosts) -> str:
    reached = f"the last checkpoint is step {newest}" if newest else "no checkpoint was saved yet"
    again = "start all processes again" if processes.count > 1 else "the same command again"
    return f"{reached}; {again} to go on"


def _newest(workdir: pathlib.Path) -> int | None:
    """For last words, which do not wait for long."""
    return run_folder.within(10.0, lambda: checkpoint.newest_in(workdir))


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _in_background(work: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """The result to come of `work` in a thread of its own, which a program that ends does not wait
    for.
    """
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="compile", daemon=True).start()
    return future
