"""What batches of pretraining examples are like: lengths, masks, labels, pieces, in figures.

In:  batches as the builders make them, and the vocabulary.
Out: `Statistics`, exact counts that can be added up over any number of batches.

Shapes: B examples, L sequence length, P masked slots, V vocabulary, G masked runs.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Self

import numpy as np

from albert_jax.data.examples import Vocabulary


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts over examples.

    Attributes:
        labels_2: int64, examples of each sentence label; zeros where there is none.
        lengths_L: int64 [L+1], examples of each length, special tokens included.
        second_shares: what is segment B of each example's tokens, summed over examples.
        masked_share_100: int64 [101], examples by the share of their tokens that is masked, rounded
            to whole per cents.
        budget_reached: examples that mask as many pieces as masked_lm_prob and P allow.
        to_mask, kept, replaced: masked pieces by what the model sees in their place.
        run_words_G: int64, masked runs by how many words begin in them. A run is what is masked
            side by side: n-grams that touch are one. None begins in what was cut off from its word.
        pieces_V: int64 [V], how often each piece stands in the text, before masking.
        word_begins: pieces of the text that begin a word.
    """

    labels_2: np.ndarray
    lengths_L: np.ndarray
    second_shares: float
    masked_share_100: np.ndarray
    budget_reached: int
    to_mask: int
    kept: int
    replaced: int
    run_words_G: np.ndarray
    pieces_V: np.ndarray
    word_begins: int

    def __add__(self, other: Self) -> Self:
        return type(self)(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in dataclasses.fields(self)
            }
        )

    @property
    def examples(self) -> int:
        """How many examples were counted."""
        return int(self.lengths_L.sum())

    @property
    def tokens(self) -> int:
        """Their tokens, special ones included, padding not."""
        return int(self.lengths_L @ np.arange(len(self.lengths_L)))

    @property
    def masked(self) -> int:
        """Their masked pieces."""
        return self.to_mask + self.kept + self.replaced

    def figures(self) -> dict[str, float]:
        """Shares and means by name."""
        examples, tokens, masked = self.examples, self.tokens, max(self.masked, 1)
        runs = max(int(self.run_words_G.sum()), 1)
        found = {
            "mean_length": tokens / examples,
            "full_length_share": self.lengths_L[-1] / examples,
            "predictions_per_token": self.masked / tokens,
            "masked_to_MASK": self.to_mask / masked,
            "kept": self.kept / masked,
            "random": self.replaced / masked,
            "budget_reached_share": self.budget_reached / examples,
        }
        if self.labels_2.sum():
            found["label_1_share"] = self.labels_2[1] / self.labels_2.sum()
            found["segment_B_share_of_tokens"] = self.second_shares / examples
        for words, count in enumerate(self.run_words_G[:9]):
            found[f"masked runs of {words} words"] = count / runs
        return {name: float(value) for name, value in found.items()}


def of(
    batches: Iterable[Mapping[str, np.ndarray]],
    vocabulary: Vocabulary,
    masked_lm_prob: float,
) -> Statistics:
    """Counts over all examples of `batches`; rows of padding count nothing.

    Args:
        batches: of one length and at least one, as the builders make them.
        vocabulary: of their tokenizer.
        masked_lm_prob: share of the tokens that is to be masked.
    """
    total: Statistics | None = None
    for batch in batches:
        counted = _count(batch, vocabulary, masked_lm_prob)
        total = counted if total is None else total + counted
    if total is None:
        raise ValueError("there are no batches to count.")
    return total


def unmasked(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """`input_ids` as they were before they were masked, [B, L]."""
    ids_BL = batch["input_ids"].copy()
    row, slot = np.nonzero(batch["masked_lm_weights"])
    ids_BL[row, batch["masked_lm_positions"][row, slot]] = batch["masked_lm_ids"][row, slot]
    return ids_BL


def _count(
    batch: Mapping[str, np.ndarray], vocabulary: Vocabulary, masked_lm_prob: float
) -> Statistics:
    real_B = batch["attention_mask"].any(1)
    batch = {name: array[real_B] for name, array in batch.items()}
    B, L = batch["input_ids"].shape
    P = batch["masked_lm_ids"].shape[1]
    text_BL = batch["attention_mask"] == 1
    lengths_B = text_BL.sum(1)
    real_BP = batch["masked_lm_weights"] > 0
    masked_B = real_BP.sum(1)
    row, slot = np.nonzero(real_BP)
    positions = batch["masked_lm_positions"][row, slot]
    seen, truth = batch["input_ids"][row, positions], batch["masked_lm_ids"][row, slot]
    is_mask, is_kept = seen == vocabulary.mask_id, seen == truth
    masked_BL = np.zeros((B, L + 1), bool)
    masked_BL[row, positions] = True
    ids_BL = unmasked(batch)
    special_BL = (ids_BL == vocabulary.cls_id) | (ids_BL == vocabulary.sep_id)
    starts_BL = vocabulary.starts_word[ids_BL] & text_BL & ~special_BL
    budgets_L = [min(P, max(1, round(n * masked_lm_prob))) for n in range(L + 1)]
    labels_B = batch.get("sentence_order_labels", np.zeros(0, np.int64))
    return Statistics(
        labels_2=np.bincount(labels_B, minlength=2),
        lengths_L=np.bincount(lengths_B, minlength=L + 1),
        second_shares=float(((batch["token_type_ids"] == 1) & text_BL).sum(1) @ (1 / lengths_B)),
        masked_share_100=np.bincount(
            np.round(100 * masked_B / np.maximum(lengths_B, 1)).astype(int), minlength=101
        ),
        budget_reached=int((masked_B >= np.array(budgets_L)[lengths_B]).sum()),
        to_mask=int(is_mask.sum()),
        kept=int((is_kept & ~is_mask).sum()),
        replaced=int((~is_kept & ~is_mask).sum()),
        run_words_G=_run_words(masked_BL, starts_BL, L),
        pieces_V=np.bincount(ids_BL[text_BL & ~special_BL], minlength=vocabulary.vocab_size),
        word_begins=int(starts_BL.sum()),
    )


def _run_words(masked_BL: np.ndarray, starts_BL: np.ndarray, L: int) -> np.ndarray:
    """How many masked runs there are of each number of words, int64 [L+1]."""
    flat = masked_BL.ravel()  # a row ends with a place that is never masked
    begins = flat & ~np.roll(flat, 1)
    run_of = np.cumsum(begins) - 1
    starts = np.pad(starts_BL, ((0, 0), (0, 1))).ravel()
    words_G = np.bincount(run_of[flat], weights=starts[flat], minlength=int(begins.sum()))
    return np.bincount(words_G.astype(int), minlength=L + 1)
