"""Which words made a decision: integrated gradients, and attention rollout beside them.

Integrated gradients (Sundararajan, Taly and Yan 2017, arXiv:1703.01365) walk from the text with all
its words masked to the text as it is, and give each piece what it added to the score on the way;
together that is the whole difference of the scores. Attention rollout (Abnar and Zuidema 2020,
arXiv:2005.00928, section 3) follows what the first position, which the decision is read from, has
looked at through all layers; it says nothing of for or against.

Letters: L sequence length, E embedding size, S points on the way, K labels, N blocks, H heads.
"""

import dataclasses
import functools
import html
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.model.finetuning import FinetuningModel
from albert_jax.tasks import task as task_lib

_POINTS = (32, 64, 128, 256, 512)  # on the way; more where the sum is not met yet
_AT_ONCE = 16
_TOLERANCE = 0.005  # of the difference of the scores
_LEAST = 1e-3  # a difference below which there is nothing to share out


@dataclasses.dataclass(frozen=True)
class Word:
    """A word's part in a decision.

    Attributes:
        text, start, end: the word, and where it stands in its segment.
        segment: 0, or 1 for a word of the second text.
        attribution: what it added to the score.
        rollout: its share of the attention, all words and special pieces together having 1.
    """

    text: str
    start: int
    end: int
    segment: int
    attribution: float
    rollout: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A decision, word by word.

    Attributes:
        texts: the segments.
        label: the class that was chosen; "" where a number was predicted.
        score: its score for the text (the number, or the class's logit).
        masked_score: the same with all words masked.
        words: their attributions add up to the difference.
    """

    texts: tuple[str, ...]
    label: str
    score: float
    masked_score: float
    words: tuple[Word, ...]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    def html(self) -> str:
        """A page: words that spoke for the decision blue, against it orange."""
        most = max((abs(word.attribution) for word in self.words), default=0.0) or 1.0
        widest = max((word.rollout for word in self.words), default=0.0) or 1.0
        paragraphs = []
        for number, text in enumerate(self.texts):
            parts, end = [], 0
            for word in (one for one in self.words if one.segment == number):
                parts.append(html.escape(text[end : word.start]))
                color = "49,110,181" if word.attribution > 0 else "214,110,40"
                strength = abs(word.attribution) / most
                parts.append(
                    f'<span style="background:rgba({color},{strength:.2f});'
                    f'border-bottom:{3 * word.rollout / widest:.1f}px solid #555" '
                    f'title="{word.attribution:+.4f}, attention {word.rollout:.1%}">'
                    f"{html.escape(word.text)}</span>"
                )
                end = word.end
            parts.append(html.escape(text[end:]))
            paragraphs.append(f"<p>{''.join(parts)}</p>")
        decision = html.escape(self.label) or f"{self.score:.4g}"
        return (
            '<!doctype html><meta charset="utf-8"><title>explanation</title>'
            '<body style="font:16px/1.9 sans-serif;max-width:48em;margin:2em auto">'
            f"<h3>{decision}</h3>{''.join(paragraphs)}"
            f'<p style="color:#666;font-size:13px">score {self.score:.4f}, with all words masked '
            f"{self.masked_score:.4f}. Blue spoke for the decision, orange against it; the line "
            "under a word is its share of the attention.</p></body>\n"
        )


def explain(
    model: FinetuningModel,
    params: Any,
    tokenizer: Tokenizer,
    text: str,
    pair: str | None,
    longest: int,
    labels: Sequence[str],
) -> Explanation:
    """The part of every word in the decision on a text, or on a pair of them.

    Args:
        model, params: with the head "sequence_classification".
        tokenizer: the model's.
        text, pair: what is decided on.
        longest: pieces that the model reads.
        labels: names of the classes; at most one where a number is predicted.

    Raises:
        UserError: more pieces than that.
    """
    texts = (text,) if pair is None else (text, pair)
    encoded = [tokenizer.encode_with_spans(one) for one in texts]
    ids, types = task_lib.join(tokenizer, *(pieces for pieces, _ in encoded))
    if len(ids) > longest:
        raise UserError(
            f"{text[:60]!r}... has {len(ids)} pieces; this model reads {longest} at most."
        )
    # Where each piece stands; None of special ones.
    places: list[tuple[int, tuple[int, int]] | None] = [None] * len(ids)
    at = 1
    for segment, (pieces, spans) in enumerate(encoded):
        at = len(ids) - 1 - len(pieces) if segment else at
        for offset, span in enumerate(spans):
            places[at + offset] = (segment, span)
    content_L = np.asarray([place is not None for place in places])
    ids_L, types_L = np.asarray(ids, np.int32), np.asarray(types, np.int32)
    table = params["embeddings"]["word_embeddings"]
    words_LE = table[ids_L]
    masked_LE = jnp.where(content_L[:, None], table[tokenizer.mask_id], words_LE)
    ends = np.asarray(_scores(model, params, ids_L, types_L, jnp.stack([masked_LE, words_LE])))
    chosen = int(ends[1].argmax())
    score, masked_score = float(ends[1, chosen]), float(ends[0, chosen])
    slopes = functools.partial(_slopes, model, params, ids_L, types_L, chosen)
    added_L = _integrated(slopes, masked_LE, words_LE, score - masked_score)
    rollout_L = _rollout(_attentions(model, params, ids_L, types_L))
    words = _words(texts, places, added_L, rollout_L)
    label = labels[chosen] if len(labels) > 1 else ""
    return Explanation(texts, label, score, masked_score, tuple(words))


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    model: FinetuningModel, params: Any, ids_L: Any, types_L: Any, words_SLE: jax.Array
) -> jax.Array:
    """Scores of S versions of a sequence, given by their word embeddings. [S, K]"""
    shape = words_SLE.shape[:2]
    output: Any = model.apply(
        {"params": params},
        jnp.broadcast_to(ids_L, shape),
        jnp.broadcast_to(types_L, shape),
        jnp.ones(shape, jnp.int32),
        words_BLE=words_SLE,
    )
    return output.logits


@functools.partial(jax.jit, static_argnums=0)
def _slopes(
    model: FinetuningModel, params: Any, ids_L: Any, types_L: Any, chosen: Any, words_SLE: jax.Array
) -> jax.Array:
    """The gradient of one class's score by the word embeddings, of S versions. [S, L, E]"""

    def score(words_SLE: jax.Array) -> jax.Array:
        return jnp.sum(_scores(model, params, ids_L, types_L, words_SLE)[:, chosen])

    return jax.grad(score)(words_SLE)


@functools.partial(jax.jit, static_argnums=0)
def _attentions(model: FinetuningModel, params: Any, ids_L: Any, types_L: Any) -> jax.Array:
    """Of every block and head, what each position looks at. [N, H, L, L]"""
    output: Any = model.apply(
        {"params": params},
        ids_L[None],
        types_L[None],
        jnp.ones_like(ids_L)[None],
        output_attentions=True,
    )
    return output.encoder.attentions_NBHLM[:, 0]


def _integrated(
    slopes: Callable[[jax.Array], jax.Array],
    masked_LE: jax.Array,
    words_LE: jax.Array,
    difference: float,
) -> np.ndarray:
    """What each piece added to the score on the way from all masked; float64 [L].

    By Gauss and Legendre's rule, with more points until the sum is met.
    """
    step_LE = words_LE - masked_LE
    added_L = np.zeros(words_LE.shape[0])
    for points in _POINTS:
        nodes_S, weights_S = np.polynomial.legendre.leggauss(points)
        way_S, weights_S = (nodes_S + 1.0) / 2.0, weights_S / 2.0
        total_LE = np.zeros(words_LE.shape)
        for first in range(0, points, _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            way_S11 = jnp.asarray(way_S[part, None, None], jnp.float32)
            words_SLE = masked_LE[None] + way_S11 * step_LE[None]
            slopes_SLE = np.asarray(slopes(words_SLE), np.float64)
            total_LE += np.einsum("s,sle->le", weights_S[part], slopes_SLE)
        added_L = np.sum(total_LE * np.asarray(step_LE, np.float64), axis=-1)
        if abs(added_L.sum() - difference) <= _TOLERANCE * max(abs(difference), _LEAST):
            break
    return added_L


def _rollout(attentions_NHLM: jax.Array) -> np.ndarray:
    """What the first position has looked at through all layers; float64 [L], its sum 1."""
    flow_LM = itself_LM = np.eye(attentions_NHLM.shape[-1])
    for heads_HLM in np.asarray(attentions_NHLM, np.float64):
        # Half of what a position holds afterwards came past the attention.
        flow_LM = (0.5 * heads_HLM.mean(axis=0) + 0.5 * itself_LM) @ flow_LM
    return flow_LM[0]


def _words(
    texts: Sequence[str],
    places: Sequence[tuple[int, tuple[int, int]] | None],
    added_L: np.ndarray,
    rollout_L: np.ndarray,
) -> list[Word]:
    """Words with what their pieces have together; a piece belongs to the word that it begins in, or
    to the one before it.
    """
    words: list[Word] = []
    for segment, text in enumerate(texts):
        found = [match.span() for match in task_lib.WORD.finditer(text)] or [(0, len(text))]
        added, seen = np.zeros(len(found)), np.zeros(len(found))
        begins = np.asarray([start for start, _ in found])
        for piece, place in enumerate(places):
            if place is None or place[0] != segment:
                continue
            word = max(int(np.searchsorted(begins, place[1][0], side="right")) - 1, 0)
            added[word] += added_L[piece]
            seen[word] += rollout_L[piece]
        words += [
            Word(text[start:end], start, end, segment, float(added[word]), float(seen[word]))
            for word, (start, end) in enumerate(found)
        ]
    return words
