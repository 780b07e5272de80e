"""Self-attention over padded sequences, by whichever implementation the caller names.

`xla` is the plain one: every other agrees with it to the dtype's precision. Kernels never have the
scores in the device's main memory, and have no dropout.

Letters: B batch, L queries, M keys, D = H*K, H heads, K size of a head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from albert_jax.model import layers

# Added to a padded key's score, as in the released code; finite, so that a row of nothing but
# padding is no NaN.
MASKED_SCORE = -10_000.0


def attend(
    implementation: str,
    q_BLD: jax.Array,
    k_BMD: jax.Array,
    v_BMD: jax.Array,
    attention_mask_BM: jax.Array,
    num_heads: int,
    dropout: Callable[[jax.Array], jax.Array] | None,
) -> tuple[jax.Array, jax.Array | None]:
    """softmax(q k / sqrt(K) + mask) v for each head.

    Args:
        implementation: xla (auto, where nobody chose); flash or splash on a TPU; cudnn on a GPU.
        q_BLD, k_BMD, v_BMD: projections in the compute dtype, heads side by side.
        attention_mask_BM: 1 for a real key, 0 for padding.
        num_heads: H.
        dropout: what is done to probabilities_BHLM, if anything; only `xla` can.

    Returns:
        (context_BLD in q's dtype, probabilities_BHLM in float32 before dropout, of `xla` alone).
    """
    if implementation in ("auto", "xla"):
        context_BLD, probabilities_BHLM = _plain(
            q_BLD, k_BMD, v_BMD, attention_mask_BM, num_heads, dropout
        )
        return checkpoint_name(context_BLD, "context"), probabilities_BHLM
    raise NotImplementedError(implementation)


def _plain(
    q_BLD: jax.Array,
    k_BMD: jax.Array,
    v_BMD: jax.Array,
    attention_mask_BM: jax.Array,
    num_heads: int,
    dropout: Callable[[jax.Array], jax.Array] | None,
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
    bias_BM = (1.0 - attention_mask_BM.astype(jnp.float32)) * MASKED_SCORE
    probabilities_BHLM = jax.nn.softmax(scores_BHLM + bias_BM[:, None, None, :], axis=-1)
    dropped_BHLM = probabilities_BHLM.astype(v_BMD.dtype)
    if dropout is not None:
        dropped_BHLM = dropout(dropped_BHLM)
    context_BLHK = jnp.einsum("bhlm,bmhk->blhk", dropped_BHLM, v_BMHK, precision=precision)
    return context_BLHK.reshape(q_BLD.shape), probabilities_BHLM
