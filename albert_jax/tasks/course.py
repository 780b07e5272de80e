"""A task as the training loop sees it: batches, predictions, figures, wording, pictures.

In:  a `Task`, read by its own module, and a program with its head.
Out: a `loop.Course`; predictions and figures of any model with the task's head.
"""

import dataclasses
import hashlib
import importlib
import json
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from albert_jax.config import Config
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import augmentation, batches
from albert_jax.tasks.task import Features, Outputs, Task
from albert_jax.training import report, run_folder, sharding, telemetry
from albert_jax.training.program import Program

# Which module reads a task.
_GLUE = ("cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "qnli", "rte", "wnli", "ax")
MODULES = {
    **dict.fromkeys(_GLUE, "glue"),
    "squad": "squad",
    "race": "race",
    "swag": "race",
    "xnli": "xnli",
    "ner": "ner",
    "retrieval": "retrieval",
    "table": "table",
}
_OF_TEXTS = ("glue", "xnli", "table")


def read(config: Config, tokenizer: Tokenizer) -> Task:
    """The task that `config.task` names, out of the files under `config.data.path`.

    Raises:
        UserError: no such task, or nothing there to learn from.
    """
    name = config.task.name
    if name not in MODULES:
        raise UserError(f"task.name={name!r} is none of: {', '.join(MODULES)}.")
    if not config.data.path:
        raise UserError("data.path is empty; name the folder of the task's files with --data.")
    if augmentation.is_asked(config.augmentation) and MODULES[name] not in _OF_TEXTS:
        raise UserError(
            "augmentation is for classification and regression of texts; "
            f"task.name={name} is neither."
        )
    module: Any = importlib.import_module(f"albert_jax.tasks.{MODULES[name]}")
    task: Task = module.load(config, tokenizer, run_folder.fetched(config.data.path))
    if not task.splits or task.splits[0].score is None:
        raise UserError(f"{config.data.path} has no labelled rows to evaluate {name} on.")
    return task


def resolve(
    config: Config, task: Task, tokenizer: Tokenizer, fixed: Collection[str] = ()
) -> Config:
    """The config with what only the task knows: head, labels, and how many steps its epochs are.

    Where epochs were asked for, the warm-up and what lies between evaluations and checkpoints keep
    their share of the run, but for the fields in `fixed`.

    Raises:
        UserError: nothing to train on.
    """
    rows = len(task.train)
    if not rows:
        raise UserError(f"{config.data.path}: the train split of {config.task.name} has no rows.")
    config = _timed(config, rows, fixed)
    fingerprint = f"{tokenizer.sha256[:16]}-{_fingerprint(task.train)}"
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, store_fingerprint=fingerprint),
        task=dataclasses.replace(
            config.task,
            head=task.head,
            labels=json.dumps(list(task.labels), ensure_ascii=False),
            **task.settings,
        ),
    )


def _timed(config: Config, rows: int, fixed: Collection[str]) -> Config:
    """Epochs as steps."""
    train = config.train
    if not train.epochs:
        return config
    steps = max(1, round(train.epochs * -(-rows // train.global_batch_size)))

    def scaled(section: str, name: str) -> Any:
        part = getattr(config, section)
        value = getattr(part, name)
        if value and f"{section}.{name}" not in fixed:
            value = max(1, round(value * steps / train.steps))
        return dataclasses.replace(part, **{name: value})

    return dataclasses.replace(
        config,
        train=dataclasses.replace(train, steps=steps),
        optimizer=scaled("optimizer", "warmup_steps"),
        eval=scaled("eval", "every_steps"),
        checkpoint=scaled("checkpoint", "every_steps"),
    )


class Course:
    """What a fine-tuning run is taught and judged by; see `loop.Course`.

    Args:
        run: its program; the config is the resolved one.
        task: what it learns.
        tokenizer: what its rows were made with.
    """

    def __init__(self, run: Program, task: Task, tokenizer: Tokenizer) -> None:
        self._task, self._config, self.tokenizer = task, run.config, tokenizer
        self._judged = [split for split in task.splits if split.score is not None]
        parts = [task.train, *(split.features for split in task.splits)]
        self._lengths = batches.lengths(parts, run.config.data.max_seq_length)
        size, seed = run.config.train.global_batch_size, run.config.data.seed
        self.examples = batches.Rows(task.train, size, self._lengths, tokenizer.pad_id, seed)
        self._rows = [
            batches.Rows(split.features, size, self._lengths, tokenizer.pad_id)
            for split in self._judged
        ]
        self.held_out = _Chain(self._rows)
        self.evaluation_batches: int | None = None
        self.only_batch: Any = None

    def evaluate(
        self, program: Program, params: Any, batches: Iterable[Mapping[str, np.ndarray]]
    ) -> dict[str, dict[str, float]]:
        """Figures of every split that has labels; the first is "validation"."""
        size, stream = self._config.train.global_batch_size, iter(batches)
        found = {}
        for number, (split, rows) in enumerate(zip(self._judged, self._rows, strict=True)):
            count = rows.examples_per_epoch // size
            mine = (batch for _, batch in zip(range(count), stream, strict=False))
            outputs = _outputs(program, params, mine, split.features)
            assert split.score is not None
            found["validation" if number == 0 else split.name] = split.score(outputs)
            if number == 0:
                self._outputs = outputs
        for _ in stream:  # to its end, where the loop goes back to its own pace
            pass
        return found

    def score(self, figures: Mapping[str, float]) -> float:
        """The figure that the task is judged by."""
        return figures[self._task.best_by]

    def note(self, means: Mapping[str, float]) -> str:
        """The means of a few steps, for the progress line."""
        if len(self._task.labels) == 1:
            return f"loss {means['loss']:.4f}"
        return f"loss {means['loss']:.4f}, {means['accuracy']:.1%} right"

    def summary(self, figures: Mapping[str, Mapping[str, float]], number: int) -> str:
        """An evaluation, as a person reads it."""
        del number
        names = [split.name for split in self._judged]
        return "\n  ".join(
            (f"{name}: " if len(names) > 1 else "") + described(found)
            for name, found in zip(names, figures.values(), strict=True)
        )

    def draw(self, workdir: pathlib.Path) -> None:
        """Draws the run's report, and what the task can show of its predictions."""
        report.draw_task(workdir, self._task.best_by)
        if self._task.draw is not None:
            self._task.draw(self._outputs, workdir / "report")

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Floating-point operations of a training step on one row of a batch, padding included."""
        length = batch["input_ids"].shape[-1]
        encoder = telemetry.encoder_flops_per_sequence(self._config.model, length)
        return encoder * self._task.train.choices


def judge(
    program: Program,
    params: Any,
    task: Task,
    tokenizer: Tokenizer,
    folder: pathlib.Path | None,
) -> dict[str, dict[str, float]]:
    """Figures of every split that has labels; writes the predictions of all.

    Args:
        program, params: with the task's head.
        task: read with the model's tokenizer.
        tokenizer: the model's.
        folder: of the predictions; None where another process writes them.
    """
    parts = [split.features for split in task.splits]
    lengths = batches.lengths(parts, program.config.data.max_seq_length)
    found = {}
    for split in task.splits:
        outputs = predict(program, params, split.features, lengths, tokenizer.pad_id)
        if split.score is not None:
            found[split.name] = split.score(outputs)
        if folder is not None:
            folder.mkdir(exist_ok=True)
            split.write(outputs, folder)
    return found


def described(figures: Mapping[str, float]) -> str:
    """Figures as a person reads them."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.4f}"
        for name, value in figures.items()
        if name != "score"
    )


def predict(
    program: Program,
    params: Any,
    features: Features,
    lengths: Sequence[int],
    pad_id: int,
) -> Outputs:
    """What a model says of rows, batch by batch.

    Args:
        program, params: with the head of the features.
        features: the rows.
        lengths: what batches may be padded to.
        pad_id: the piece that pads.
    """
    size = program.config.train.global_batch_size
    rows = batches.Rows(features, size, lengths, pad_id)
    here = sharding.local_rows(program.batch_sharding, size)
    numbers = np.concatenate([np.arange(*part, dtype=np.int64) for part in here])
    count = rows.examples_per_epoch // size
    made = (rows.rows(number * size + numbers) for number in range(count))
    return _outputs(program, params, made, features)


class _Chain:
    """The batches of several evaluations, one behind the other."""

    def __init__(self, parts: Sequence[batches.Rows]) -> None:
        self._parts = parts
        self._ends = np.cumsum([part.examples_per_epoch for part in parts])
        self.examples_per_epoch = int(self._ends[-1]) if parts else 0

    def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """As `batches.Rows.rows`; a batch is of one part."""
        first = int(numbers[0]) if len(numbers) else 0
        part = int(np.searchsorted(self._ends, first, side="right"))
        before = int(self._ends[part - 1]) if part else 0
        return self._parts[part].rows(numbers - before)


def _outputs(
    program: Program, params: Any, made: Iterable[Mapping[str, np.ndarray]], features: Features
) -> Outputs:
    """Of each row of the features what the head says of it, without padding."""
    found: dict[str, list[Any]] = {}
    kept = program.evaluated(params, _needed(made))
    for outputs in kept:
        rows = outputs.pop("row")
        for name, values in outputs.items():
            into = found.setdefault(name, [None] * len(features))
            for value, row in zip(values, rows, strict=True):
                if row >= 0:
                    into[row] = value
    if program.config.task.head in ("token_classification", "question_answering"):
        for row, value in enumerate(found.get("logits", [])):
            length = features.offsets[row + 1] - features.offsets[row]
            found["logits"][row] = value[:length]
    return found


def _needed(
    made: Iterable[Mapping[str, np.ndarray]],
) -> Iterator[dict[str, np.ndarray]]:
    """Batches without the targets, which say nothing new to a prediction."""
    wanted = ("input_ids", "token_type_ids", "attention_mask", "answerable", "row")
    for batch in made:
        yield {name: batch[name] for name in wanted if name in batch}


def _fingerprint(features: Features) -> str:
    """A short hash of what is learnt from: a run stays with the rows it began with."""
    digest = hashlib.sha256()
    for array in (features.ids, features.offsets, *features.targets.values()):
        digest.update(np.ascontiguousarray(array).tobytes())
    for array in features.token_targets.values():
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
