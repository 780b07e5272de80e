"""An encoder with a fine-tuned head: a class, number or choice for a text, a label for each piece,
or a span.

The heads are those of Google's fine-tuning scripts and of Transformers, one dense layer each, over
what every family has: dropout, dense, and activation over the first position (the pooler), then
dropout and the head. RoBERTa's classifier and DistilBERT's "pre_classifier" are that pooler under
other names.

Letters: B batch, C choices, L sequence length, D hidden size, K labels.

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
)
_POOLED = ("sequence_classification", "multiple_choice")
_FIRST_DROPOUT, _HEAD_DROPOUT = 4, 5  # the sites after those of the encoder


class FinetuningOutput(NamedTuple):
    """Scores in float32: [B, K] of a sequence; [B, L, K] of each piece; [B, L, 2] start and end of
    a span; [B, C] of choices. `pooled_BD` is None for heads over pieces.
    """

    logits: jax.Array
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
    ) -> FinetuningOutput:
        """Scores of a batch; dropout where keys are given.

        For multiple choice all three inputs are [B, C, L].
        """
        cfg, choices = self.config, None
        dtype = jnp.dtype(cfg.dtype)
        if self.head == "multiple_choice":
            choices = input_ids_BL.shape[1]
            input_ids_BL, token_type_ids_BL, attention_mask_BL = (
                x.reshape(-1, x.shape[-1])
                for x in (input_ids_BL, token_type_ids_BL, attention_mask_BL)
            )
            if dropout_keys_B is not None:
                of_choices = jax.vmap(jax.random.fold_in, (None, 0))
                each = jax.vmap(of_choices, (0, None))(dropout_keys_B, jnp.arange(choices))
                dropout_keys_B = each.reshape(-1)
        x_BLD, _ = encoder.Embeddings(cfg, dtype, name="embeddings")(
            input_ids_BL, token_type_ids_BL, dropout_keys_B
        )
        encoded = encoder.Encoder(cfg, dtype, self.shards, name="encoder")(
            x_BLD, attention_mask_BL, dropout_keys_B, output_hidden_states
        )

        def drop(x: jax.Array, site: int) -> jax.Array:
            return layers.dropout(x, cfg.classifier_dropout_prob, dropout_keys_B, site)

        features, pooled_BD = encoded.sequence_BLD, None
        if self.head in _POOLED:
            first_BD = encoded.sequence_BLD[:, 0]
            if cfg.model_type == "roberta":
                first_BD = drop(first_BD, _FIRST_DROPOUT)
            features = pooled_BD = encoder.pooled(cfg, dtype, first_BD)
        if self.head != "question_answering":
            features = drop(features, _HEAD_DROPOUT)
        # In float32: rounded scores would often tie.
        logits = layers.Dense(
            {"question_answering": 2, "multiple_choice": 1}.get(self.head, self.num_labels),
            ("hidden", "label"),
            cfg.initializer_range,
            jnp.dtype(jnp.float32),
            name="classifier",
        )(features)
        if choices is not None:
            logits = logits.reshape(-1, choices)
        return FinetuningOutput(logits, pooled_BD, encoded)
