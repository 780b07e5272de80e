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
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np

from albert_jax.config import AUTO, Config
from albert_jax.data import examples, pipeline, store
from albert_jax.errors import UserError
from albert_jax.progress import Progress
from albert_jax.training import (
    checkpoint,
    compilation_cache,
    distillation,
    evaluation,
    fitting,
    goodput,
    hosts,
    optimizer,
    program,
    report,
    sharding,
    step,
    telemetry,
)
from albert_jax.training import workdir as workdir_lib
from albert_jax.training.compiler_options import compiler_options

_STEPS_AHEAD = 2  # of the device; more would only be longer to wait for when the run must stop

TrainStep = Callable[..., step.TrainState]
Batches = Generator[dict[str, np.ndarray], None, None]


def resolve(config: Config, data: store.Store) -> Config:
    """The config with what only the store knows, vocabulary size and fingerprint, and what only the
    teacher's run knows, its newest checkpoint.

    Raises:
        UserError: the config names another vocabulary than the store's, or a teacher that has
            another one or is none.
    """
    vocab_size = data.vocab_size
    if config.model.vocab_size not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}, but the tokenizer of {data.path} has "
            f"{vocab_size} pieces; "
            f"set it to 0 (the store's) or {vocab_size}, or prepare the text with the tokenizer "
            "you mean."
        )
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size),
        data=dataclasses.replace(config.data, store_fingerprint=data.fingerprint),
    )
    return distillation.resolve(config, data.tokenizer().sha256)


def example_builder(config: Config, data: store.Store, split: str) -> examples.ExampleBuilder:
    """The examples of a split as a run sees them: with its own settings, or the fixed ones of the
    validation split.
    """
    fields = config.data if split == "train" else evaluation.held_out(config.data)
    options = examples.ExampleOptions(
        max_seq_length=fields.max_seq_length,
        max_predictions_per_seq=fields.max_predictions_per_seq,
        masked_lm_prob=fields.masked_lm_prob,
        ngram=fields.ngram,
        short_seq_prob=fields.short_seq_prob,
        seed=fields.seed,
        sentence_objective=config.model.sentence_objective,
        single_sentence=fields.single_sentence,
        whole_word_masking=fields.whole_word_masking,
    )
    vocabulary = examples.Vocabulary.of(data.tokenizer())
    return examples.ExampleBuilder(data.split(split), vocabulary, options)


def train(
    run: program.Program,
    data: store.Store,
    workdir: pathlib.Path,
    processes: hosts.Hosts,
    profile: tuple[int, int] | None = None,
    started: float | None = None,
    start: Callable[[step.TrainState], step.TrainState] | None = None,
) -> bool:
    """Trains to `train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
        run: the compiled program; its config is the resolved one.
        data: the token store.
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
    folder = workdir / "checkpoints"
    processes.outlook = lambda: _outlook(folder, processes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.stop_signals())
        if processes.leader:
            stack.enter_context(workdir_lib.prepare(workdir, run.config))
            workdir_lib.write_tokenizer(data.tokenizer(), workdir)
        workdir_lib.check_shared(workdir, run.config, processes)
        minutes = run.config.train.stall_minutes
        stack.enter_context(goodput.Watchdog(clock, minutes, workdir, processes))
        saved = stack.enter_context(checkpoint.Checkpoints(folder, run.config.checkpoint.keep))
        return _Loop(run, data, workdir, saved, processes, clock, profile, start).run()


class _Loop:
    """The state of one call of `train`."""

    def __init__(
        self,
        run: program.Program,
        data: store.Store,
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
        self._tracing, self._start = False, start
        self._unigram_loss = data.unigram_loss
        self._examples = example_builder(run.config, data, "train")
        self._held_out = example_builder(run.config, data, "validation")
        self._frozen = (run.teacher.params(),) if run.teacher else ()
        batch_size = run.config.train.global_batch_size
        self._rows = sharding.local_rows(run.batch_sharding, batch_size)
        self._rate = optimizer.learning_rate(run.config.optimizer, run.config.train.steps)
        sequence_flops = telemetry.model_flops_per_sequence(
            run.config.model, run.config.data, run.teacher.model.config if run.teacher else None
        )
        peak = telemetry.peak_flops(run.mesh.devices.flat[0])
        self._utilization = (
            sequence_flops * batch_size / (peak * run.mesh.size) if peak is not None else None
        )
        self._best = saved.best_loss
        self._skipped = processes.share("skipped", lambda: workdir_lib.read_skipped(workdir))
        self._cache: compilation_cache.Cache | None = None
        if jax.default_backend() != "cpu":  # one CPU's programs would not run on every other
            kept = workdir / compilation_cache.FOLDER
            directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(kept))
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
            if number >= total and not evaluation_owed:
                self._progress.write(f"{self._workdir} is trained already: all {total} steps.")
                return True
            if number:
                self._progress.write(f"goes on after step {number}")
            if self._profile and number >= self._profile[0]:
                self._progress.write(f"--profile: step {self._profile[0]} is done already")
            train_step = self._compile() if number < total else self._program.train_step
            self._last_save = time.monotonic()
            self._start_window(number)
            self._clock.turn_to("step")
            if evaluation_owed:
                self._evaluate(state, number)
            while number < total and not self._hosts.stopping:
                number += 1
                with self._traced(number):
                    state = train_step(state, self._next_batch(), *self._frozen)
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
                if save or self._hosts.stopping or self._is_best(evaluated):
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
        total = self._config.train.steps
        owed = False
        self._log: telemetry.MetricsLog | None = None
        if self._hosts.leader:
            rows = list(telemetry.read_metrics(self._workdir / "metrics.jsonl"))
            newest = self._saved.newest  # none where a run begins with --init
            seconds = self._saved.seconds(newest) if newest else {}
            self._clock.rewind(seconds, goodput.read_fields(rows[-1] if rows else {}))
            self._log = telemetry.MetricsLog(self._workdir, number)
            evaluated = any(row["step"] == number and "split" in row for row in rows)
            due = number == total or (number and _due(number, self._config.eval.every_steps))
            owed = bool(due and not evaluated)
        stream = None if self._hosts.leader else open(os.devnull, "w")  # noqa: PTH123, SIM115
        self._progress = Progress("train", total, "step", initial=number, stream=stream)
        return self._hosts.share("evaluation owed", lambda: owed)

    def _open_batches(self, number: int) -> None:
        """The batches after step `number` come next."""
        self._stream = pipeline.training_batches(
            self._examples,
            number,
            self._config.train.steps,
            self._config.train.global_batch_size,
            self._rows,
            self._skipped,
        )
        self._batches: Iterator[dict[str, np.ndarray]] = self._stream

    def _compile(self) -> TrainStep:
        """The compiled step. A run that must stop does not wait for it, and ends here."""
        began = time.monotonic()
        with self._clock.during("compile"):
            compiled = _in_background(self._fitted_step)
            # The first batch is made meanwhile.
            self._batches = itertools.chain([next(self._stream)], self._stream)
            while not compiled.done() and not self._hosts.stop_asked:
                concurrent.futures.wait([compiled], timeout=0.2)
            if self._hosts.order() is hosts.Order.STOP:
                self._progress.write(
                    f"{self._hosts.stop_asked}: there is nothing new to save; the same command "
                    f"goes on after step {self._saved.newest or 0}."
                )
                self._hosts.leave()
            train_step, notes = compiled.result()
            self._hosts.meet("compiled")
        self._progress.write(f"compiled in {time.monotonic() - began:.1f} s{notes}")
        return train_step

    def _fitted_step(self) -> tuple[TrainStep, str]:
        """The step, compiled with whatever the config leaves open, and what to say of it."""
        config, mesh, cache = self._config, self._program.mesh, self._cache
        device = mesh.local_devices[0]
        limit, options = fitting.memory_limit(device), compiler_options(device.device_kind)
        left_open = config.train.microbatch_size == AUTO or config.model.remat == "auto"
        try:
            if left_open:
                fitted = fitting.fit(config, mesh, limit, options, cache)
            else:
                fitted = fitting.compile_program(self._program, limit, options, cache)
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

    def _next_batch(self) -> dict[str, jax.Array]:
        with self._clock.during("data_wait"):
            batch = next(self._batches)
        return sharding.to_global(
            batch, self._program.batch_sharding, self._config.train.global_batch_size
        )

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
            f"{self._workdir / 'checkpoints'}. Batches left out before: {left_out}; "
            f"train.max_skipped_batches={self._config.train.max_skipped_batches} allows no more. "
            "Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or train with "
            "model.dtype=float32, in another workdir."
        )

    def _skipped_note(self) -> str:
        return f"; {len(self._skipped)} batches left out" if self._skipped else ""

    def _start_window(self, number: int) -> None:
        """Begins the time of the next logged line."""
        self._window_first, self._window_spent = number, self._clock.seconds()

    def _log_window(self, state: step.TrainState, number: int) -> None:
        window, window_steps = jax.device_get((state.window, state.window_steps))
        steps = max(number - self._window_first, 1)
        spent = self._clock.seconds()
        waited = spent["data_wait"] - self._window_spent["data_wait"]
        seconds = (spent["step"] - self._window_spent["step"] + waited) / steps
        names = [name for name in step.METRICS + step.TEACHER_METRICS if name in window]
        means = {name: float(window[name]) / int(window_steps) for name in names}
        utilization = self._utilization
        values: dict[str, float | None] = {
            **means,
            "learning_rate": float(self._rate(number)),
            "examples_per_second": self._config.train.global_batch_size / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": waited / steps,
            "model_flops_utilization": None if utilization is None else utilization / seconds,
            **self._clock.fields(),
        }
        if self._log:
            self._log.write(number, values)
        note = f"loss {means['loss']:.3f}, words {means['masked_lm_accuracy']:.1%}"
        if self._config.model.sentence_objective != "none":
            note += f", sentences {means['sentence_order_accuracy']:.1%}"
        self._progress.advance(steps, f"{note}, {values['examples_per_second']:.0f} examples/s")
        self._start_window(number)

    def _evaluate(self, state: step.TrainState, number: int) -> dict[str, float] | None:
        """Figures of the validation split; None where the run has to stop before they are there."""
        limit = self._config.eval.steps or None
        batch_size = self._config.train.global_batch_size
        batches = pipeline.evaluation_batches(self._held_out, batch_size, self._rows, limit)
        with self._clock.during("evaluation"), contextlib.closing(batches):
            try:
                metrics = evaluation.evaluate(
                    self._program, state.params, self._until_stopped(batches)
                )
            except _Stopped:
                return None
            if self._log:
                skipped = {"skipped_batches": len(self._skipped), **self._clock.fields()}
                self._log.write(number, {**metrics, **skipped}, split="validation")
                report.draw(self._workdir, self._unigram_loss)
        text = summary(metrics, self._config) + self._skipped_note()
        self._progress.write(f"step {number}, validation: {text}")
        warmed_up = number >= max(self._config.optimizer.warmup_steps, 1)
        if warmed_up and metrics["masked_lm_loss"] > self._unigram_loss:
            self._progress.write(
                f"  still above {self._unigram_loss:.3f}, the loss of a model that knows only "
                "how frequent each piece is."
            )
        return metrics

    def _until_stopped(self, batches: Batches) -> Iterator[dict[str, np.ndarray]]:
        self._hosts.change_pace()
        for batch in batches:
            if self._hosts.order() is hosts.Order.STOP:
                raise _Stopped
            self._clock.moved()
            yield batch
        self._hosts.change_pace()

    def _is_best(self, evaluated: dict[str, float] | None) -> bool:
        if evaluated is None or not math.isfinite(evaluated["loss"]):
            return False
        if self._best is not None and evaluated["loss"] >= self._best:
            return False
        self._best = evaluated["loss"]
        return True

    def _save_due(self) -> bool:
        minutes = self._config.checkpoint.every_minutes
        return minutes > 0 and time.monotonic() - self._last_save >= 60.0 * minutes

    def _save(
        self, state: step.TrainState, number: int, evaluated: dict[str, float] | None
    ) -> None:
        with self._clock.during("checkpoint"):
            self._saved.save(state, number, evaluated, self._clock.seconds())
        self._last_save = time.monotonic()

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
                f"steps {first} to {last} are traced: tensorboard --logdir={self._workdir}/profile"
            )


def summary(metrics: dict[str, float], config: Config) -> str:
    """An evaluation as a person reads it."""
    text = (
        f"masked words {metrics['masked_lm_loss']:.3f} nats (perplexity "
        f"{metrics['perplexity']:.1f}), "
        f"{metrics['masked_lm_accuracy']:.1%} right"
    )
    if config.model.sentence_objective != "none":
        text += (
            f"; sentences {metrics['sentence_order_loss']:.3f} nats, "
            f"{metrics['sentence_order_accuracy']:.1%} right"
        )
    return text


class _Stopped(Exception):  # noqa: N818
    """The run was ordered to stop while it evaluated."""


def _outlook(folder: pathlib.Path, processes: hosts.Hosts) -> str:
    newest = checkpoint.newest_in(folder)
    reached = f"the last checkpoint is step {newest}" if newest else "no checkpoint was saved yet"
    again = "start all processes again" if processes.count > 1 else "the same command again"
    return f"{reached}; {again} to go on"


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
