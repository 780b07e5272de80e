"""An encoder with a fine-tuned head: a class, number or choice for a text, a label for each piece,
a span, or a vector.

The heads are those of Google's fine-tuning scripts and of Transformers, one dense layer each, over
what every family has: dropout, dense, and activation over the first position (the pooler), then
dropout and the head. RoBERTa's classifier and DistilBERT's "pre_classifier" are that pooler under
other names. Two are different: `question_answering_conditional`, which finds the end of a span
given its begin and says whether there is any (XLNet's, used by ALBERT for SQuAD 2.0), and
`embedding`, the mean over the real pieces as a vector of length one (Reimers and Gurevych 2019,
arXiv:1908.10084), which has no parameters.

Letters: B batch, C choices, L sequence length, D hidden size, K labels, S begins that are followed
up.

Sources: google-research/albert classifier_utils.py, squad_utils.py, race_utils.py; Transformers'
modeling files of each family.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from albert_jax.config import ModelConfig
from albert_jax.model import encoder, layers

HEADS = (
    "sequence_classification",
    "token_classification",
    "question_answering",
    "multiple_choice",
    "question_answering_conditional",
    "embedding",
)
_POOLED = ("sequence_classification", "multiple_choice")
_CHOICES = ("multiple_choice", "embedding")
# The sites after those of the encoder.
_FIRST_DROPOUT, _HEAD_DROPOUT, _ANSWER_DROPOUT = 4, 5, 6
BEGINS, ENDS = 5, 5  # of a conditional span: how many are followed up [run_squad_v2.py]
_NEVER = -1e30


class Spans(NamedTuple):
    """What a conditional span head says, float32 but for the indices.

    Attributes:
        start_log_probs_BL: of every piece to be the begin.
        end_log_probs_BL: of every piece to be the end, given the begin that was told; None where
            none was.
        answer_logit_B: high where there is no answer.
        top_start_BS, top_start_log_probs_BS: the most probable begins; None where one was told.
        top_end_BST, top_end_log_probs_BST: of each, the most probable ends.
    """

    start_log_probs_BL: jax.Array
    end_log_probs_BL: jax.Array | None
    answer_logit_B: jax.Array
    top_start_BS: jax.Array | None
    top_start_log_probs_BS: jax.Array | None
    top_end_BST: jax.Array | None
    top_end_log_probs_BST: jax.Array | None


class FinetuningOutput(NamedTuple):
    """Scores in float32: [B, K] of a sequence; [B, L, K] of each piece; [B, L, 2] start and end of
    a span, or `Spans` with the conditional head; [B, C] of choices; [B, C, D] vectors. `pooled_BD`
    is None for heads over pieces.
    """

    logits: jax.Array | Spans
    pooled_BD: jax.Array | None
    encoder: encoder.EncoderOutput


class FinetuningModel(nn.Module):
    """An encoder of the family with one head.

    Attributes:
        config: the encoder's.
        head: one of HEADS.
        num_labels: K; 1 with sequence_classification is a number to be regressed.
    """

    config: ModelConfig
    head: str
    num_labels: int = 2
    shards: int = 1

    @nn.compact
    def __call__(
        self,
        input_ids_BL: jax.Array,
        token_type_ids_BL: jax.Array,
        attention_mask_BL: jax.Array,
        dropout_keys_B: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        gradient_weights: encoder.GradientWeights | None = None,
        answerable_BL: jax.Array | None = None,
        start_positions_B: jax.Array | None = None,
        words_BLE: jax.Array | None = None,
    ) -> FinetuningOutput:
        """Scores of a batch; dropout where keys are given.

        For multiple choice and embedding the inputs are [B, C, L]; [B, L] is one choice.

        Args:
            input_ids_BL, token_type_ids_BL, attention_mask_BL: as in pretraining.
            dropout_keys_B: a PRNG key for each row, or None.
            output_hidden_states, output_attentions: also return every block's.
            gradient_weights: what the gradient through each depth counts.
            answerable_BL: of the conditional head, 1 where an answer may begin or end; everywhere
                by default.
            start_positions_B: of the conditional head, the begins to be told the end head.
            words_BLE: word embeddings instead of those of the ids.
        """
        cfg, choices = self.config, None
        dtype = jnp.dtype(cfg.dtype)
        if self.head in _CHOICES:
            choices = input_ids_BL.shape[1] if input_ids_BL.ndim == 3 else 1
            input_ids_BL, token_type_ids_BL, attention_mask_BL = (
                x.reshape(-1, x.shape[-1])
                for x in (input_ids_BL, token_type_ids_BL, attention_mask_BL)
            )
            if dropout_keys_B is not None:
                of_choices = jax.vmap(jax.random.fold_in, (None, 0))
                each = jax.vmap(of_choices, (0, None))(dropout_keys_B, jnp.arange(choices))
                dropout_keys_B = each.reshape(-1)
        x_BLD, _ = encoder.Embeddings(cfg, dtype, name="embeddings")(
            input_ids_BL, token_type_ids_BL, dropout_keys_B, words_BLE
        )
        encoded = encoder.Encoder(cfg, dtype, self.shards, name="encoder")(
            x_BLD,
            attention_mask_BL,
            dropout_keys_B,
            output_hidden_states,
            output_attentions,
            gradient_weights,
        )

        def drop(x: jax.Array, site: int) -> jax.Array:
            return layers.dropout(x, cfg.classifier_dropout_prob, dropout_keys_B, site)

        if self.head == "embedding":
            vectors_BD = _mean_vector(encoded.sequence_BLD, attention_mask_BL)
            vectors_BCD = vectors_BD.reshape(-1, choices or 1, vectors_BD.shape[-1])
            return FinetuningOutput(vectors_BCD, None, encoded)
        if self.head == "question_answering_conditional":
            if answerable_BL is None:
                answerable_BL = attention_mask_BL
            head = ConditionalSpanHead(cfg, name="classifier")
            spans = head(encoded.sequence_BLD, answerable_BL, start_positions_B, dropout_keys_B)
            return FinetuningOutput(spans, None, encoded)
        features, pooled_BD = encoded.sequence_BLD, None
        if self.head in _POOLED:
            first_BD = encoded.sequence_BLD[:, 0]
            if cfg.model_type == "roberta":
                first_BD = drop(first_BD, _FIRST_DROPOUT)
            features = pooled_BD = encoder.pooled(cfg, dtype, first_BD)
        if self.head != "question_answering":
            features = drop(features, _HEAD_DROPOUT)
        labels = {"question_answering": 2, "multiple_choice": 1}.get(self.head, self.num_labels)
        logits = _dense(cfg, labels, "classifier")(features)
        if choices is not None:
            logits = logits.reshape(-1, choices)
        return FinetuningOutput(logits, pooled_BD, encoded)


class ConditionalSpanHead(nn.Module):
    """The begin of a span, its end given the begin, and whether there is one.

    Source: google-research/albert squad_utils.py, `create_v2_model`; Yang et al. 2019,
    arXiv:1906.08237, appendix.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        sequence_BLD: jax.Array,
        answerable_BL: jax.Array,
        start_positions_B: jax.Array | None,
        dropout_keys_B: jax.Array | None,
    ) -> Spans:
        """With `start_positions_B` (training) the ends given those begins; without, the most
        probable begins and ends.
        """
        cfg = self.config
        x_BLD = sequence_BLD.astype(jnp.float32)
        hidden = x_BLD.shape[-1]
        end_hidden = _dense(cfg, hidden, "end_hidden", "pooled")
        end_norm = layers.LayerNorm(
            "pooled", cfg.layer_norm_eps, jnp.dtype(jnp.float32), name="end_norm"
        )
        end = _dense(cfg, 1, "end")

        def log_probs(scores_BxL: jax.Array, allowed_BxL: jax.Array) -> jax.Array:
            return jax.nn.log_softmax(jnp.where(allowed_BxL > 0, scores_BxL, _NEVER))

        start_BL = log_probs(_dense(cfg, 1, "start")(x_BLD)[..., 0], answerable_BL)

        def ends(begin_BSD: jax.Array) -> jax.Array:
            """Of each begin the log probabilities of the ends, [B, S, L]."""
            begins, length = begin_BSD.shape[1], x_BLD.shape[1]
            shape = (x_BLD.shape[0], begins, length, hidden)
            both = jnp.concatenate(
                [
                    jnp.broadcast_to(x_BLD[:, None], shape),
                    jnp.broadcast_to(begin_BSD[:, :, None], shape),
                ],
                axis=-1,
            )
            scores_BSL = end(end_norm(jnp.tanh(end_hidden(both))))[..., 0]
            return log_probs(scores_BSL, jnp.broadcast_to(answerable_BL[:, None], scores_BSL.shape))

        weighted_BD = jnp.einsum("bl,bld->bd", jnp.exp(start_BL), x_BLD)
        answer_BD = jnp.tanh(
            _dense(cfg, hidden, "answer_hidden", "pooled")(
                jnp.concatenate([weighted_BD, x_BLD[:, 0]], axis=-1)
            )
        )
        answer_BD = layers.dropout(
            answer_BD, cfg.classifier_dropout_prob, dropout_keys_B, _ANSWER_DROPOUT
        )
        answer_B = _dense(cfg, 1, "answer")(answer_BD)[:, 0]
        if start_positions_B is not None:
            begin_BSD = jnp.take_along_axis(x_BLD, start_positions_B[:, None, None], axis=1)
            return Spans(start_BL, ends(begin_BSD)[:, 0], answer_B, None, None, None, None)
        best_BS, at_BS = jax.lax.top_k(start_BL, min(BEGINS, start_BL.shape[1]))
        end_BSL = ends(jnp.take_along_axis(x_BLD, at_BS[..., None], axis=1))
        ends_BST, ends_at_BST = jax.lax.top_k(end_BSL, min(ENDS, end_BSL.shape[2]))
        return Spans(start_BL, None, answer_B, at_BS, best_BS, ends_at_BST, ends_BST)


def _mean_vector(sequence_BLD: jax.Array, attention_mask_BL: jax.Array) -> jax.Array:
    """The mean over the real pieces, of length one; zeros where there are none. float32 [B, D]."""
    x_BLD = sequence_BLD.astype(jnp.float32)
    sum_BD = jnp.einsum("bl,bld->bd", attention_mask_BL.astype(jnp.float32), x_BLD)
    # The length does not change when the sum is not divided. 1e-12: rows that only fill up.
    square_B1 = jnp.sum(jnp.square(sum_BD), axis=-1, keepdims=True)
    return sum_BD * jax.lax.rsqrt(jnp.maximum(square_B1, 1e-12))


def _dense(cfg: ModelConfig, features: int, name: str, axis: str = "label") -> layers.Dense:
    """A head's dense layer. In float32: rounded scores would often tie."""
    return layers.Dense(
        features, ("hidden", axis), cfg.initializer_range, jnp.dtype(jnp.float32), name=name
    )
