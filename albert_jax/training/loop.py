"""The training loop, top to bottom: restore, step, log, evaluate, save, stop.

The device is never waited for but where a line is logged, the split evaluated or a checkpoint
saved. A run that is killed anywhere and started again goes on as if nothing had happened: the state
holds everything, and its step is the place in the data.
"""

import dataclasses
import fcntl
import itertools
import math
import pathlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

import jax

from albert_jax import config as config_lib
from albert_jax.config import Config
from albert_jax.data import examples, pipeline, store
from albert_jax.errors import UserError
from albert_jax.progress import Progress
from albert_jax.training import (
    checkpoint,
    evaluation,
    inference,
    optimizer,
    program,
    report,
    sharding,
    step,
    telemetry,
)


def resolve(config: Config, data: store.Store) -> Config:
    """The config with what only the store knows: vocabulary size and fingerprint.

    Raises:
        UserError: the config names another vocabulary than the store's.
    """
    vocab_size = data.vocab_size
    if config.model.vocab_size not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}, but the tokenizer of {data.path} has "
            f"{vocab_size} pieces; "
            f"set it to 0 (the store's) or {vocab_size}, or prepare the text with the tokenizer "
            "you mean."
        )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size),
        data=dataclasses.replace(config.data, store_fingerprint=data.fingerprint),
    )


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
    )
    vocabulary = examples.Vocabulary.of(data.tokenizer())
    return examples.ExampleBuilder(data.split(split), vocabulary, options)


def prepare_workdir(workdir: pathlib.Path, config: Config) -> TextIO:
    """Makes the folder or checks that it holds this very run; returns the lock that keeps others
    out while it is open.

    Raises:
        UserError: another run's folder, one in use, or one that cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror}.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"--workdir={workdir}: another process is training there.") from None
    path = workdir / "config.json"
    if path.exists():
        differing = config_lib.differing_fields(config, config_lib.read_workdir(workdir))
        if differing:
            raise UserError(
                f"--workdir={workdir} holds a run with another config; choose another folder, "
                "or set back:\n  " + "\n  ".join(differing)
            )
    else:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(config.to_json(), encoding="utf-8")
        temporary.replace(path)
    return lock


def train(run: program.Program, data: store.Store, workdir: pathlib.Path) -> bool:
    """Trains to `train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
        run: the compiled program; its config is the resolved one.
        data: the token store.
        workdir: see the workdir contract: config.json, checkpoints/, metrics.jsonl, tensorboard/,
            report/.

    Returns:
        True when all steps are done; False when a signal stopped it, its state saved.

    Raises:
        UserError: a loss or gradient that is not finite, a checkpoint that does not fit.
    """
    with (
        prepare_workdir(workdir, run.config),
        checkpoint.Checkpoints(workdir / "checkpoints", run.config.checkpoint.keep) as saved,
        _StopSignals() as stop,
    ):
        inference.keep_tokenizer(data, workdir)
        return _Loop(run, data, workdir, saved, stop).run()


class _Loop:
    """The state of one call of `train`."""

    def __init__(
        self,
        run: program.Program,
        data: store.Store,
        workdir: pathlib.Path,
        saved: checkpoint.Checkpoints,
        stop: "_StopSignals",
    ) -> None:
        self._program, self._config, self._workdir = run, run.config, workdir
        self._saved, self._stop, self._unigram_loss = saved, stop, data.unigram_loss
        self._examples = example_builder(run.config, data, "train")
        self._held_out = example_builder(run.config, data, "validation")
        batch_size = run.config.train.global_batch_size
        self._rows = sharding.local_rows(run.batch_sharding, batch_size)
        self._rate = optimizer.learning_rate(run.config.optimizer, run.config.train.steps)
        sequence_flops = telemetry.model_flops_per_sequence(run.config.model, run.config.data)
        peak = telemetry.peak_flops(run.mesh.devices.flat[0])
        self._utilization = (
            sequence_flops * batch_size / (peak * run.mesh.size) if peak is not None else None
        )
        self._best = saved.best_loss

    def run(self) -> bool:
        config, total = self._config, self._config.train.steps
        start = self._saved.newest or 0
        if start:
            state = self._saved.restore(self._program.abstract_state, start)
        else:
            state = self._program.init()
        if start >= total:
            print(f"{self._workdir} is trained already: {start} of {total} steps.")
            return True
        train_step = self._program.train_step
        self._log = telemetry.MetricsLog(self._workdir, start)
        self._progress = Progress("train", total, "step", initial=start)
        if start:
            self._progress.write(f"goes on after step {start}")
        stream = pipeline.training_batches(
            self._examples, start, total, config.train.global_batch_size, self._rows
        )
        # The first batch and the compiler are waited for here, once, and not counted as step time.
        batches = itertools.chain([next(stream)], stream)
        compiling = time.monotonic()
        train_step = train_step.lower(state, self._program.abstract_batch()).compile()
        self._progress.write(f"compiled in {time.monotonic() - compiling:.1f} s")
        self._last_save = time.monotonic()
        self._start_window(start)
        try:
            for number in range(start + 1, total + 1):
                batch = self._next(batches)
                state = train_step(state, batch)
                last = number == total
                if number % config.log.every_steps == 0 or last:
                    self._log_window(state, number)
                evaluated = None
                if last or _due(number, config.eval.every_steps):
                    evaluated = self._evaluate(state, number)
                stopped = self._stop.signal_name
                if last or stopped or self._save_due(number) or self._is_best(evaluated):
                    self._save(state, number, evaluated)
                    if stopped and not last:
                        self._saved.wait()
                        self._progress.write(
                            f"{stopped}: saved step {number} of {total}; the same command goes "
                            "on from there."
                        )
                        return False
            self._saved.wait()
            return True
        finally:
            self._progress.close()
            self._log.close()
            stream.close()

    def _next(self, batches: Iterator[Any]) -> dict[str, jax.Array]:
        waiting = time.monotonic()
        batch = next(batches)
        self._data_wait += time.monotonic() - waiting
        return sharding.to_global(
            batch, self._program.batch_sharding, self._config.train.global_batch_size
        )

    def _start_window(self, number: int) -> None:
        """Begins the time of the next logged line; what was not training before now is left out of
        it.
        """
        self._window_start, self._window_first, self._data_wait = time.monotonic(), number, 0.0

    def _log_window(self, state: step.TrainState, number: int) -> None:
        window, window_steps, bad_step = jax.device_get(
            (state.window, state.window_steps, state.bad_step)
        )
        self._refuse_bad_step(int(bad_step))
        steps = max(number - self._window_first, 1)
        seconds = (time.monotonic() - self._window_start) / steps
        means = {name: float(window[name]) / int(window_steps) for name in step.METRICS}
        utilization = self._utilization
        values: dict[str, float | None] = {
            **means,
            "learning_rate": float(self._rate(number)),
            "examples_per_second": self._config.train.global_batch_size / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": self._data_wait / steps,
            "model_flops_utilization": None if utilization is None else utilization / seconds,
        }
        self._log.write(number, values)
        note = f"loss {means['loss']:.3f}, words {means['masked_lm_accuracy']:.1%}"
        if self._config.model.sentence_objective != "none":
            note += f", sentences {means['sentence_order_accuracy']:.1%}"
        self._progress.advance(steps, f"{note}, {values['examples_per_second']:.0f} examples/s")
        self._start_window(number)

    def _evaluate(self, state: step.TrainState, number: int) -> dict[str, float]:
        limit = self._config.eval.steps or None
        batch_size = self._config.train.global_batch_size
        batches = pipeline.evaluation_batches(self._held_out, batch_size, self._rows, limit)
        metrics = evaluation.evaluate(self._program, state.params, batches)
        self._log.write(number, metrics, split="validation")
        report.draw(self._workdir, self._unigram_loss)
        self._progress.write(f"step {number}, validation: {summary(metrics, self._config)}")
        warmed_up = number >= max(self._config.optimizer.warmup_steps, 1)
        if warmed_up and metrics["masked_lm_loss"] > self._unigram_loss:
            self._progress.write(
                f"  still above {self._unigram_loss:.3f}, the loss of a model that knows only "
                "how frequent each piece is."
            )
        self._start_window(number)
        return metrics

    def _is_best(self, evaluated: dict[str, float] | None) -> bool:
        if evaluated is None or not math.isfinite(evaluated["loss"]):
            return False
        if self._best is not None and evaluated["loss"] >= self._best:
            return False
        self._best = evaluated["loss"]
        return True

    def _save_due(self, number: int) -> bool:
        minutes = self._config.checkpoint.every_minutes
        by_time = minutes > 0 and time.monotonic() - self._last_save >= 60.0 * minutes
        return by_time or _due(number, self._config.checkpoint.every_steps)

    def _save(
        self, state: step.TrainState, number: int, evaluated: dict[str, float] | None
    ) -> None:
        self._refuse_bad_step(int(state.bad_step))
        self._saved.save(state, number, evaluated)
        self._last_save = time.monotonic()

    def _refuse_bad_step(self, bad_step: int) -> None:
        if bad_step < 0:
            return
        self._saved.wait()
        good = self._saved.newest
        where = (
            f"the last good checkpoint is step {good}" if good else "no checkpoint was saved yet"
        )
        raise UserError(
            f"loss or gradient of step {bad_step + 1} is not finite; {where} in "
            f"{self._workdir / 'checkpoints'}. "
            "Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or train with "
            "model.dtype=float32, "
            "in another workdir."
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


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


class _StopSignals:
    """Remembers SIGTERM or Ctrl-C instead of dying of it; a second Ctrl-C is not held back."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        signal.signal(number, self._previous[number])
