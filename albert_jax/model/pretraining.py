"""The whole pretraining model: embeddings, encoder, pooler, masked-word head and sentence head.

Letters: B batch, L sequence length, P masked slots, V vocabulary, E embedding size, D hidden size.
Source of every part: google-research/albert modeling.py and run_pretraining.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from albert_jax.config import ModelConfig
from albert_jax.model import encoder, layers


class PretrainingOutput(NamedTuple):
    """Scores in float32; the sentence scores are None where the objective has no sentence head,
    and the pooled output where the model has no pooler. Of packed rows these are [B, S, 2] and
    [B, S, D], for S segments.
    """

    masked_lm_logits_BPV: jax.Array
    sentence_order_logits_B2: jax.Array | None
    pooled_BD: jax.Array | None
    encoder: encoder.EncoderOutput


class PretrainingModel(nn.Module):
    """An encoder of the family with its pretraining heads.

    With `shards` > 1 it is one device's part of a model whose layers are split (see `layers`).
    """

    config: ModelConfig
    shards: int = 1

    @nn.compact
    def __call__(
        self,
        input_ids_BL: jax.Array,
        token_type_ids_BL: jax.Array,
        attention_mask_BL: jax.Array,
        masked_lm_positions_BP: jax.Array,
        dropout_keys_B: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        gradient_weights: encoder.GradientWeights | None = None,
        segment_ids_BL: jax.Array | None = None,
        cls_positions_BS: jax.Array | None = None,
    ) -> PretrainingOutput:
        """Scores of a batch; dropout where keys are given.

        Args:
            input_ids_BL: int32 in [0, V), 0 on padding.
            token_type_ids_BL: int32 in [0, type_vocab_size).
            attention_mask_BL: 1 on real tokens, 0 on padding.
            masked_lm_positions_BP: int32 in [0, L), 0 on unused slots.
            dropout_keys_B: a PRNG key for each row, or None.
            output_hidden_states, output_attentions: also return every block's.
            gradient_weights: what the gradient through each depth counts; all alike by default.
            segment_ids_BL, cls_positions_BS: of packed rows, whose segments have positions of their
                own and do not see each other: 1, 2, 3, ... and 0 on padding; and where each of up
                to S segments begins, 0 where there is none.
        """
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        embeddings = encoder.Embeddings(cfg, dtype, name="embeddings")
        positions_BL = None
        if segment_ids_BL is not None:
            assert cls_positions_BS is not None  # they come together
            positions_BL = encoder.restarting_positions(segment_ids_BL, cls_positions_BS)
        x_BLD, words_VE = embeddings(
            input_ids_BL, token_type_ids_BL, dropout_keys_B, positions_BL=positions_BL
        )
        encoded = encoder.Encoder(cfg, dtype, self.shards, name="encoder")(
            x_BLD,
            attention_mask_BL,
            dropout_keys_B,
            output_hidden_states,
            output_attentions,
            gradient_weights,
            segment_ids_BL,
        )
        pooled_BD = None
        if cfg.pooler:
            first_BD = encoded.sequence_BLD[:, 0]
            if cls_positions_BS is not None:
                first_BD = jnp.take_along_axis(
                    encoded.sequence_BLD, cls_positions_BS[..., None], axis=1
                )
            pooled_BD = encoder.pooled(cfg, dtype, first_BD)
        logits_BPV = MaskedLanguageHead(cfg, dtype, name="masked_lm")(
            encoded.sequence_BLD, masked_lm_positions_BP, words_VE
        )
        sentence_logits_B2 = None
        if cfg.sentence_objective != "none":
            # In float32: two rounded scores would often tie.
            head = layers.Dense(
                2,
                ("hidden", "label"),
                cfg.initializer_range,
                jnp.dtype(jnp.float32),
                name="sentence_order",
            )
            assert pooled_BD is not None  # the config's own check
            sentence_logits_B2 = head(pooled_BD)
        return PretrainingOutput(logits_BPV, sentence_logits_B2, pooled_BD, encoded)


class MaskedLanguageHead(nn.Module):
    """Scores of every piece at the masked positions; the output matrix is the word embeddings'
    table.
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, sequence_BLD: jax.Array, positions_BP: jax.Array, words_VE: jax.Array
    ) -> jax.Array:
        """Returns logits_BPV in float32."""
        cfg = self.config
        # Gathered before the dense layers: P is a sixth of L, and V is large.
        h_BPD = jnp.take_along_axis(sequence_BLD, positions_BP[..., None], axis=1)
        h_BPE = layers.Dense(
            cfg.embedding_size,
            ("hidden", "embedding"),
            cfg.initializer_range,
            self.dtype,
            name="dense",
        )(h_BPD)
        # RoBERTa's head keeps the erf GELU whatever the layers have. [modeling_roberta.py]
        activation = "gelu" if cfg.model_type == "roberta" else cfg.hidden_act
        h_BPE = layers.ACTIVATIONS[activation](h_BPE)
        h_BPE = layers.LayerNorm("embedding", cfg.layer_norm_eps, self.dtype, name="layer_norm")(
            h_BPE
        )
        bias_V = self.param(
            "bias", layers.named(nn.initializers.zeros_init(), "vocab"), (cfg.vocab_size,)
        )
        logits_BPV = jnp.einsum(
            "bpe,ve->bpv",
            h_BPE,
            words_VE.astype(self.dtype),
            precision=layers.precision(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits_BPV + bias_V[None, None, :]
