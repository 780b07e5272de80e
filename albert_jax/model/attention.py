"""Self-attention over padded sequences, by whichever implementation the config names.

`xla` is the plain one: every other agrees with it to the dtype's precision. `flash` and `splash`
are Pallas kernels for TPUs, `cudnn` NVIDIA's own for GPUs: they never have the scores in the
device's main memory, and have no dropout.

Letters: B batch, L queries, M keys, D = H*K, H heads, K size of a head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from albert_jax.config import ModelConfig
from albert_jax.errors import UserError
from albert_jax.model import layers

# Added to a padded key's score, as in the released code; finite, so that a row of nothing but
# padding is no NaN.
MASKED_SCORE = -10_000.0

_PLATFORMS = {"flash": "tpu", "splash": "tpu", "cudnn": "gpu"}
_FASTEST = {"tpu": "flash", "gpu": "cudnn"}


def choose(
    config: ModelConfig, length: int, platform: str, shards: int = 1, packing: bool = False
) -> str:
    """What `model.attention` means for sequences of `length` on a platform.

    `auto` is the platform's kernel where it can do the work, otherwise `xla`. On every TPU from v4
    to v6e `flash` has the shortest modelled step (benchmarks in the README).

    Args:
        config: the model.
        length: L.
        platform: cpu, gpu or tpu.
        shards: over how many devices the heads are split.
        packing: rows hold several segments that do not see each other.

    Raises:
        UserError: the implementation asked for cannot do it; names the field to change.
    """
    if config.attention == "auto":
        fastest = _FASTEST.get(platform, "xla")
        return "xla" if _refusal(fastest, config, length, platform, shards, packing) else fastest
    refusal = _refusal(config.attention, config, length, platform, shards, packing)
    if refusal:
        raise UserError(f"model.attention={config.attention}: {refusal}")
    return config.attention


def _refusal(
    implementation: str,
    config: ModelConfig,
    length: int,
    platform: str,
    shards: int,
    packing: bool,
) -> str:
    """Why an implementation cannot do the work; empty if it can."""
    if implementation == "xla":
        return ""
    wanted = _PLATFORMS[implementation]
    if platform != wanted:
        return (
            f"runs on a {wanted.upper()}, and this is a {platform.upper()}; set it to auto or xla."
        )
    if config.attention_probs_dropout_prob > 0:
        return (
            f"has no dropout; set model.attention_probs_dropout_prob="
            f"{config.attention_probs_dropout_prob:g} to 0, or model.attention to xla."
        )
    head_size = config.hidden_size // config.num_attention_heads
    if implementation == "cudnn":
        if packing:
            return (
                "does not keep the pairs of a packed row apart; set model.attention to xla, or "
                "data.packing to False."
            )
        if config.dtype != "bfloat16" or head_size % 8 or head_size > 128:
            return (
                "takes model.dtype=bfloat16 and heads of a multiple of 8 up to 128 (here "
                f"{config.dtype} and {head_size}); set model.attention to xla."
            )
        return ""
    from albert_jax.model import kernels

    return kernels.unsupported(length, config.num_attention_heads // shards, head_size) or ""


def attend(
    implementation: str,
    q_BLD: jax.Array,
    k_BMD: jax.Array,
    v_BMD: jax.Array,
    attention_mask_BM: jax.Array,
    num_heads: int,
    dropout: Callable[[jax.Array], jax.Array] | None,
    segment_ids_BL: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """softmax(q k / sqrt(K) + mask) v for each head.

    Args:
        implementation: xla (auto, where nobody chose); flash or splash on a TPU; cudnn on a GPU.
        q_BLD, k_BMD, v_BMD: projections in the compute dtype, heads side by side.
        attention_mask_BM: 1 for a real key, 0 for padding.
        num_heads: H.
        dropout: what is done to probabilities_BHLM, if anything; only `xla` can.
        segment_ids_BL: of packed rows, in place of the mask: a query sees the keys of its own
            segment alone, and padding is one too; 0, 1, 2, ... Not with cudnn.

    Returns:
        (context_BLD in q's dtype, probabilities_BHLM in float32 before dropout, of `xla` alone).
    """
    if implementation in ("auto", "xla"):
        context_BLD, probabilities_BHLM = _plain(
            q_BLD, k_BMD, v_BMD, attention_mask_BM, num_heads, dropout, segment_ids_BL
        )
        return checkpoint_name(context_BLD, "context"), probabilities_BHLM
    if dropout is not None:
        raise ValueError(f"{implementation} attention has no dropout")
    if implementation == "cudnn":
        if segment_ids_BL is not None:
            raise ValueError("cudnn attention has no segments")
        context_BLD = _cudnn(q_BLD, k_BMD, v_BMD, attention_mask_BM, num_heads)
    else:
        from albert_jax.model import kernels

        kernel = {"flash": kernels.flash_attention, "splash": kernels.splash_attention}
        packed = segment_ids_BL is not None
        segments_BM = segment_ids_BL if packed else attention_mask_BM
        context_BLD = kernel[implementation](
            q_BLD, k_BMD, v_BMD, segments_BM, num_heads, packed=packed
        )
    return checkpoint_name(context_BLD, "context"), None


def _cudnn(
    q_BLD: jax.Array,
    k_BMD: jax.Array,
    v_BMD: jax.Array,
    attention_mask_BM: jax.Array,
    num_heads: int,
) -> jax.Array:
    # Padding stands at the end of rows. A row of nothing but padding (which fills up an
    # evaluation's last batch) keeps one key, so that it is no NaN.
    lengths_B = jnp.maximum(jnp.sum(attention_mask_BM, axis=1, dtype=jnp.int32), 1)
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1) for x in (q_BLD, k_BMD, v_BMD))
    everywhere_B = jnp.full_like(lengths_B, q.shape[1])
    context_BLHK = jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=everywhere_B,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )
    return context_BLHK.reshape(q_BLD.shape)


def _plain(
    q_BLD: jax.Array,
    k_BMD: jax.Array,
    v_BMD: jax.Array,
    attention_mask_BM: jax.Array,
    num_heads: int,
    dropout: Callable[[jax.Array], jax.Array] | None,
    segment_ids_BL: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    q_BLHK, k_BMHK, v_BMHK = (x.reshape(*x.shape[:2], num_heads, -1) for x in (q_BLD, k_BMD, v_BMD))
    precision = layers.precision(q_BLD.dtype)
    scores_BHLM = jnp.einsum(
        "blhk,bmhk->bhlm",
        q_BLHK * jnp.asarray(q_BLHK.shape[-1] ** -0.5, q_BLD.dtype),
        k_BMHK,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    if segment_ids_BL is None:
        bias_BM = (1.0 - attention_mask_BM.astype(jnp.float32)) * MASKED_SCORE
        bias_BHLM = bias_BM[:, None, None, :]
    else:
        apart_BLM = segment_ids_BL[:, :, None] != segment_ids_BL[:, None, :]
        bias_BHLM = jnp.where(apart_BLM, MASKED_SCORE, 0.0)[:, None]
    probabilities_BHLM = jax.nn.softmax(scores_BHLM + bias_BHLM, axis=-1)
    dropped_BHLM = probabilities_BHLM.astype(v_BMD.dtype)
    if dropout is not None:
        dropped_BHLM = dropout(dropped_BHLM)
    context_BLHK = jnp.einsum("bhlm,bmhk->blhk", dropped_BHLM, v_BMHK, precision=precision)
    return context_BLHK.reshape(q_BLD.shape), probabilities_BHLM
