"""Pretraining on token stores or on Google's examples, as the training loop sees it: examples,
exact held-out losses, wording, pictures.
"""

import dataclasses
import itertools
import math
import pathlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from albert_jax import curriculum
from albert_jax.config import Config, DataConfig
from albert_jax.data import corpus, examples, google_examples, mixture, nearby, pipeline
from albert_jax.data.corpus import Corpus
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.training import distillation, report, telemetry
from albert_jax.training.program import Program


class Course:
    """What a pretraining run is taught and judged by; see `loop.Course`.

    Args:
        run: its program.
        data: what it reads.
    """

    def __init__(self, run: Program, data: Corpus) -> None:
        self._run, self._config, self._data = run, run.config, data
        self._unigram_loss = data.unigram_loss
        self._teacher = run.teacher.model.config if run.teacher else None
        self.tokenizer: Tokenizer = data.tokenizer()
        # Here, so that a fault of the text is told before anything is written.
        self._alike = None if run.config.data.schedule else self._made(run.config.stages[0])
        self.held_out = HeldOut(run.config, data, run.config.eval.steps or None)
        self.evaluation_batches: int | None = None  # each part has its own number of them
        self._flops: dict[tuple[int, int], float] = {}

    def builder(self, stage: curriculum.Stage) -> pipeline.Builder:
        """The training examples of a stage; where there are several, made when they are needed."""
        return self._alike or _Later(lambda: self._made(stage))

    def _made(self, stage: curriculum.Stage) -> pipeline.Builder:
        return example_builder(self._config.at(stage), self._data, "train")

    def abstract_batch(self, stage: curriculum.Stage) -> Any:
        """Shapes and shardings of a stage's batches."""
        return dataclasses.replace(self._run, config=self._config.at(stage)).abstract_batch()

    def evaluate(
        self, program: Program, params: Any, batches: Iterable[Mapping[str, np.ndarray]]
    ) -> dict[str, dict[str, float]]:
        """Figures of the validation split; of several stores in the mix's proportion, and of each
        under its name.
        """
        return self.held_out.evaluate(program, params, batches)

    def score(self, figures: Mapping[str, float]) -> float:
        """How good that is; more is better."""
        return -figures["loss"]

    def note(self, means: Mapping[str, float]) -> str:
        """The means of a few steps, for the progress line."""
        text = f"loss {means['loss']:.3f}, words {means['masked_lm_accuracy']:.1%}"
        if self._config.model.sentence_objective != "none":
            text += f", sentences {means['sentence_order_accuracy']:.1%}"
        return text

    def summary(self, figures: Mapping[str, Mapping[str, float]], number: int) -> str:
        """An evaluation after `number` steps, as a person reads it."""
        found = figures["validation"]
        text = summary(found, self._config)
        text += "".join(
            f"\n  {split.partition('/')[2]}: {summary(part, self._config)}"
            for split, part in figures.items()
            if split != "validation"
        )
        warmed_up = number >= max(self._config.optimizer.warmup_steps, 1)
        if warmed_up and found["masked_lm_loss"] > self._unigram_loss:
            text += (
                f"\n  still above {self._unigram_loss:.3f}, the loss of a model that knows only "
                "how frequent each piece is."
            )
        return text

    def draw(self, workdir: pathlib.Path) -> None:
        """Draws the run's report."""
        report.draw(workdir, self._unigram_loss)

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Floating-point operations of a training step on one row of a batch."""
        shape = batch["input_ids"].shape[-1], batch["masked_lm_ids"].shape[-1]
        if shape not in self._flops:
            data = dataclasses.replace(
                self._config.data, max_seq_length=shape[0], max_predictions_per_seq=shape[1]
            )
            # The rows of one batch stand for all of their shape.
            attended = _attended(batch["segment_ids"]) if "segment_ids" in batch else None
            self._flops[shape] = telemetry.model_flops_per_sequence(
                self._config.model, data, self._teacher, attended
            )
        return self._flops[shape]

    def padding(self) -> str:
        """How much of the rows is padding, with and without packing; empty for a schedule, whose
        rows are not known yet.
        """
        if self._config.model.sentence_objective == "none":
            return "padding: little, full sentences fill the rows"
        if isinstance(self._alike, examples.ExampleBuilder):
            return f"padding: {_padding(self._alike.packing(), self._config.data.packing)}"
        if not isinstance(self._alike, mixture.Mixture):
            return ""
        each = zip(corpus.parts(self._data), self._alike.builders, strict=True)
        return "\n".join(
            f"padding of {name}: {_padding(builder.packing(), self._config.data.packing)}"
            for (name, _), builder in each
            if isinstance(builder, examples.ExampleBuilder)
        )


def _padding(found: examples.Packing, packed: bool) -> str:
    """How much of the rows is padding, as they are and as they would be."""
    without, within = f"{found.padding_without:.1%}", f"{found.padding_with:.1%}"
    pairs = f"{found.pairs / found.rows:.1f} pairs a row"
    if packed:
        return f"{within} of the places ({pairs}), {without} without data.packing"
    return f"{without} of the places, {within} with data.packing=True ({pairs})"


def _attended(segment_ids_BL: np.ndarray) -> float:
    """How many pairs of places of a packed row see each other, on average."""
    rows_BL = np.arange(len(segment_ids_BL))[:, None] * (segment_ids_BL.max(initial=0) + 1)
    lengths = np.bincount((rows_BL + segment_ids_BL)[segment_ids_BL > 0])
    return float(np.square(lengths, dtype=np.int64).sum() / len(segment_ids_BL))


class HeldOut:
    """The validation split as one source of examples: of several stores one after another.

    Args:
        config: the run's.
        data: what it reads.
        limit: batches of each store at most; None: all.

    Attributes:
        examples_per_epoch: of all stores, rows that fill up their last batches among them.
        batches: of all stores.
    """

    def __init__(self, config: Config, data: Corpus, limit: int | None = None) -> None:
        parts = corpus.parts(data)
        self._names, self._weights = [name for name, _ in parts], corpus.weights(data)
        builders = [example_builder(config, each, "validation") for _, each in parts]
        self._chain = mixture.Chain(builders, config.train.global_batch_size, limit)
        self.examples_per_epoch = self._chain.examples_per_epoch
        self.batches = sum(self._chain.batches)

    def rows(self, examples_B: np.ndarray) -> dict[str, np.ndarray]:
        """As `ExampleBuilder.rows`; all of one batch."""
        return self._chain.rows(examples_B)

    def evaluate(
        self, program: Program, params: Any, batches: Iterable[Mapping[str, np.ndarray]]
    ) -> dict[str, dict[str, float]]:
        """Figures out of all batches, as `evaluate` makes them: "validation", which of several
        stores has their means by weight, and "validation/NAME" of each of them.
        """
        stream = iter(batches)
        found = [
            evaluate(program, params, itertools.islice(stream, count))
            for count in self._chain.batches
        ]
        for _ in stream:  # to its end, where the loop goes back to its own pace
            pass
        if len(found) == 1:
            return {"validation": found[0]}
        named = {f"validation/{name}": part for name, part in zip(self._names, found, strict=True)}
        return {"validation": self._mixed(found), **named}

    def _mixed(self, found: list[dict[str, float]]) -> dict[str, float]:
        mixed = {
            name: sum(
                weight * part[name] for weight, part in zip(self._weights, found, strict=True)
            )
            for name in found[0]
        }
        mixed["perplexity"] = math.exp(min(mixed["masked_lm_loss"], 700.0))
        for counted in ("masked_words", "examples"):
            mixed[counted] = sum(part[counted] for part in found)
        return mixed


class _Later:
    """A builder that is made when its first examples are wanted."""

    def __init__(self, make: Callable[[], pipeline.Builder]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: pipeline.Builder | None = None

    def _builder(self) -> pipeline.Builder:
        with self._lock:
            if self._made is None:
                self._made = self._make()
        return self._made

    @property
    def examples_per_epoch(self) -> int:
        return self._builder().examples_per_epoch

    def rows(self, examples_B: np.ndarray) -> dict[str, np.ndarray]:
        return self._builder().rows(examples_B)


def resolve(config: Config, data: Corpus) -> Config:
    """The config with what only the data knows, vocabulary size and fingerprint, and what only the
    teacher's run knows, its newest checkpoint.

    Raises:
        UserError: the config names another vocabulary than the store's, or a teacher that has
            another one or is none.
    """
    vocab_size = data.vocab_size
    if config.model.vocab_size not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size={config.model.vocab_size}, but the tokenizer of {data.place} has "
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


def example_builder(
    config: Config, data: Corpus, split: str, fields: DataConfig | None = None
) -> pipeline.Builder:
    """The examples of a split as a run sees them: with its own settings, or the fixed ones of the
    validation split; or with those of `fields`.
    """
    if isinstance(data, mixture.Stores):
        builders = [example_builder(config, each, split, fields) for each in data.stores]
        return mixture.Mixture(builders, data.weights, config.data.seed)
    fields = fields or (config.data if split == "train" else held_out(config.data))
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
        packing=fields.packing,
        max_pairs_per_seq=fields.max_pairs_per_seq,
        shuffle=fields.shuffle,
        shuffle_shards=fields.shuffle_shards,
    )
    if isinstance(data, google_examples.GoogleExamples):
        return data.builder(split, options, fields.masks)
    vocabulary = examples.Vocabulary.of(data.tokenizer())
    if data.source and split == "train" and corpus.reads_near(config.data):
        stores = len(config.data.path.split(","))
        most_bytes = int(config.data.cache_gib * 2**30 / stores)
        shards, near = nearby.of_store(data, split, most_bytes)
        return examples.ExampleBuilder(shards, vocabulary, options, near)
    return examples.ExampleBuilder(data.split(split), vocabulary, options)


def held_out(data: DataConfig) -> DataConfig:
    """How validation text is cut and masked: the same in every run of one sequence length, so that
    runs compare.

    15 % of each sequence, always the same masks, no sequences cut short, one pair a row, whatever
    the run trains on and however its schedule goes.
    """
    return dataclasses.replace(
        data,
        masked_lm_prob=0.15,
        max_predictions_per_seq=max(1, round(0.15 * data.max_seq_length)),
        short_seq_prob=0.0,
        shuffle="global",
        packing=False,
        seed=0,
    )


def evaluate(
    program: Program, params: Any, batches: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """Losses and accuracies over `batches`; rows that only fill up the last batch count nothing.

    Returns:
        loss, masked_lm_loss (nats a masked piece), masked_lm_accuracy, perplexity,
        sentence_order_loss and sentence_order_accuracy (0 without a sentence objective),
        masked_words and examples counted.

    Raises:
        UserError: nothing to evaluate on.
    """
    sums = list(program.evaluated(params, batches))
    if not sums:
        raise UserError("the validation split has no examples; prepare the store with more text.")
    # Added up in float64 here: a split may have more masked words than float32 can count.
    totals = jax.tree.map(lambda *parts: float(np.sum(np.asarray(parts, np.float64))), *sums)
    masked_lm, sentence, examples = totals
    masked_lm_loss = masked_lm.loss / masked_lm.count
    sentence_loss = sentence.loss / max(sentence.count, 1)
    return {
        "loss": masked_lm_loss + sentence_loss,
        "masked_lm_loss": masked_lm_loss,
        "masked_lm_accuracy": masked_lm.correct / masked_lm.count,
        "perplexity": math.exp(min(masked_lm_loss, 700.0)),
        "sentence_order_loss": sentence_loss,
        "sentence_order_accuracy": sentence.correct / max(sentence.count, 1),
        "masked_words": masked_lm.count,
        "examples": examples,
    }


def summary(metrics: Mapping[str, float], config: Config) -> str:
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
