"""Words replaced by what a pretrained model proposes in their place.

In:  texts, and a run of ours whose masked-word head has been trained.
Out: the texts with some whole words replaced; everything between words stays as it is.

A word is masked with all its pieces as one mask, several of a text at once; its replacement is
drawn from the most probable whole words, by their probability. It fits the place but need not mean
the same: at small rates labels mostly hold.

Letters: B texts, L sequence length, P masked slots, V vocabulary, K proposals.
"""

import functools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from albert_jax import config
from albert_jax.data import augmentation
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.training import inference, program, workdir

PROPOSALS = 10  # of which one is drawn
_BATCH = 32
_SHORTEST = 32  # lengths that are compiled are this, twice this and so on
_SLOTS = 8
_Span = tuple[int, int]


class _Masked(NamedTuple):
    """A text with masks: its ids [L], where the masks are, and which characters each stands for."""

    ids: list[int]
    slots: list[int]
    spans: list[_Span]


@dataclass(frozen=True)
class Proposals:
    """A pretrained model that proposes words.

    Attributes:
        run, params: the model (`training.inference.load`).
        tokenizer: its own.
    """

    run: program.Program
    params: Any
    tokenizer: Tokenizer

    def replaced(
        self, texts: Sequence[str], rate: float, draws: Sequence[np.random.Generator]
    ) -> list[str]:
        """The texts with some words replaced.

        Words (`data.augmentation.words`) count that the tokenizer cuts off from their neighbours;
        of a text longer than the model reads, those it reads.

        Args:
            texts: any number.
            rate: share of the words that are replaced.
            draws: of each text its own, so that no text depends on another.
        """
        masked = [self._masked(text, rate, draw) for text, draw in zip(texts, draws, strict=True)]
        changes: list[list[tuple[_Span, str]]] = [[] for _ in texts]
        # Texts of like length together; short ones are not padded to the longest.
        order = sorted(
            (number for number, one in enumerate(masked) if one.slots),
            key=lambda number: len(masked[number].ids),
        )
        size = self.run.config.train.global_batch_size
        for start in range(0, len(order), size):
            part = order[start : start + size]
            ids_BPK, shares_BPK = self._proposed([masked[number] for number in part])
            for row, number in enumerate(part):
                for slot, span in enumerate(masked[number].spans):
                    old = texts[number][span[0] : span[1]]
                    new = self._drawn(old, ids_BPK[row, slot], shares_BPK[row, slot], draws[number])
                    if new is not None:
                        changes[number].append((span, new))
        return [
            augmentation.substituted(text, found)
            for text, found in zip(texts, changes, strict=True)
        ]

    @functools.cached_property
    def _whole_words(self) -> np.ndarray:
        """Whether a piece is a whole word of letters, bool [V]."""
        starts_V = self.tokenizer.word_starts() & ~self.tokenizer.is_control()
        letters_V = np.zeros_like(starts_V)
        for piece in np.flatnonzero(starts_V):
            letters_V[piece] = self.tokenizer.readable(int(piece)).isalpha()
        return letters_V

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return self.tokenizer.word_starts()

    @functools.cached_property
    def _best(self) -> Any:
        # The vocabulary may be smaller than the model's, whose other pieces are nobody's.
        allowed_V = np.zeros(self.run.config.model.vocab_size, bool)
        allowed_V[: len(self._whole_words)] = self._whole_words
        count = min(PROPOSALS + 1, int(allowed_V.sum()))  # one may be the word itself

        def best(params: Any, ids_BL: jax.Array, mask_BL: jax.Array, slots_BP: jax.Array) -> Any:
            output: Any = self.run.model.apply(
                {"params": params}, ids_BL, jnp.zeros_like(ids_BL), mask_BL, slots_BP
            )
            logits_BPV = jnp.where(allowed_V[None, None], output.masked_lm_logits_BPV, -jnp.inf)
            shares_BPK, ids_BPK = jax.lax.top_k(jax.nn.softmax(logits_BPV), count)
            return ids_BPK, shares_BPK

        return jax.jit(best)

    def _masked(self, text: str, rate: float, draw: np.random.Generator) -> _Masked:
        """The text with as many masks as words are to be replaced."""
        ids, spans = self.tokenizer.encode_with_spans(text)
        room = self.run.config.data.max_seq_length - 2
        ids, spans = ids[:room], spans[:room]
        words = [word for word in augmentation.words(text) if spans and word[1] <= spans[-1][1]]
        cuts = self._cuts(words, ids, spans)
        chosen = [cuts[place] for place in augmentation.chosen(len(cuts), len(words), rate, draw)]
        made, slots, before = [self.tokenizer.cls_id], [], 0
        for _, (begin, end) in chosen:
            made += ids[before:begin]
            slots.append(len(made))
            made.append(self.tokenizer.mask_id)
            before = end
        made += [*ids[before:], self.tokenizer.sep_id]
        return _Masked(made, slots, [word for word, _ in chosen])

    def _cuts(
        self, words: Sequence[_Span], ids: Sequence[int], spans: Sequence[_Span]
    ) -> list[tuple[_Span, _Span]]:
        """Words, each with [begin, end) of its pieces, that are the word and nothing else; other
        words are left out.
        """
        begins, ends = np.asarray(spans, np.int64).reshape(-1, 2).T
        found = []
        for word in words:
            begin = int(np.searchsorted(ends, word[0], side="right"))
            end = int(np.searchsorted(begins, word[1], side="left"))
            if begin >= end or not self._starts[ids[begin]]:
                continue
            if begins[begin] >= word[0] and ends[end - 1] <= word[1]:
                found.append((word, (begin, end)))
        return found

    def _proposed(self, masked: Sequence[_Masked]) -> tuple[np.ndarray, np.ndarray]:
        """Proposals for every mask, best first: ids int32 [B, P, K], probabilities [B, P, K]."""
        rows = self.run.config.train.global_batch_size
        longest = self.run.config.data.max_seq_length
        length, slots = _SHORTEST, _SLOTS
        while length < max(len(one.ids) for one in masked):
            length *= 2
        while slots < max(len(one.slots) for one in masked):
            slots *= 2
        ids_BL = np.full((rows, min(length, longest)), self.tokenizer.pad_id, np.int32)
        mask_BL, slots_BP = np.zeros_like(ids_BL), np.zeros((rows, slots), np.int32)
        for row, one in enumerate(masked):
            ids_BL[row, : len(one.ids)] = one.ids
            mask_BL[row, : len(one.ids)] = 1
            slots_BP[row, : len(one.slots)] = one.slots
        return jax.device_get(self._best(self.params, ids_BL, mask_BL, slots_BP))

    def _drawn(
        self, old: str, ids_K: np.ndarray, shares_K: np.ndarray, draw: np.random.Generator
    ) -> str | None:
        """One of the proposals that are not the old word; None where there are none."""
        words = [self.tokenizer.readable(piece) for piece in ids_K]
        other = [place for place, word in enumerate(words) if word.lower() != old.lower()]
        other = other[:PROPOSALS]
        shares = shares_K[other].astype(np.float64)
        if not shares.sum() > 0:
            return None
        place = other[int(draw.choice(len(other), p=shares / shares.sum()))]
        return augmentation.with_case_of(words[place], old)


def load(path: pathlib.Path) -> Proposals:
    """The newest checkpoint of a pretraining run.

    Raises:
        UserError: no run there, or one of a fine-tuning, which has no masked-word head.
    """
    if config.read_workdir(path).task.name:
        raise UserError(
            f"augmentation.model={path} is a fine-tuning, which predicts no masked words; give a "
            "run of albert_jax.train."
        )
    run, params, _ = inference.load(path, batch_size=_BATCH)
    return Proposals(run, params, workdir.load_tokenizer(path))
