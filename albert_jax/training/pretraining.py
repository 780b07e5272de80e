"""Pretraining on a token store or on Google's examples, as the training loop sees it: examples,
exact held-out losses, wording, pictures.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from albert_jax.config import Config, DataConfig
from albert_jax.data import examples, google_examples
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
        self._config, self._unigram_loss = run.config, data.unigram_loss
        self._teacher = run.teacher.model.config if run.teacher else None
        self.tokenizer: Tokenizer = data.tokenizer()
        self.examples = example_builder(run.config, data, "train")
        self.held_out = example_builder(run.config, data, "validation")
        self.evaluation_batches = run.config.eval.steps or None
        self.only_batch = run.abstract_batch()

    def evaluate(
        self, program: Program, params: Any, batches: Iterable[Mapping[str, np.ndarray]]
    ) -> dict[str, dict[str, float]]:
        """Figures of the validation split."""
        return {"validation": evaluate(program, params, batches)}

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
        del batch  # all are of one length
        return telemetry.model_flops_per_sequence(
            self._config.model, self._config.data, self._teacher
        )


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


def example_builder(
    config: Config, data: Corpus, split: str, fields: DataConfig | None = None
) -> examples.ExampleBuilder | google_examples.RecordBuilder:
    """The examples of a split as a run sees them: with its own settings, or the fixed ones of the
    validation split; or with those of `fields`.
    """
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
    )
    if isinstance(data, google_examples.GoogleExamples):
        return data.builder(split, options, fields.masks)
    vocabulary = examples.Vocabulary.of(data.tokenizer())
    return examples.ExampleBuilder(data.split(split), vocabulary, options)


def held_out(data: DataConfig) -> DataConfig:
    """How validation text is cut and masked: the same in every run of one sequence length, so that
    runs compare.

    15 % of each sequence, always the same masks, no sequences cut short, whatever the run trains
    on.
    """
    return dataclasses.replace(
        data,
        masked_lm_prob=0.15,
        max_predictions_per_seq=max(1, round(0.15 * data.max_seq_length)),
        short_seq_prob=0.0,
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
