"""Self-attention over padded sequences; which implementation runs is the caller's word.

Letters: B batch, L queries, M keys, H heads, K size of a head.
"""

import jax
import jax.numpy as jnp

from albert_jax.model import layers

# Added to a padded key's score, as in the released code; finite, so that a row of nothing but
# padding is no NaN.
MASKED_SCORE = -10_000.0


def attend(
    q_BLHK: jax.Array,
    k_BMHK: jax.Array,
    v_BMHK: jax.Array,
    attention_mask_BM: jax.Array,
    dropout_rate: float,
    dropout_keys_B: jax.Array | None,
    dropout_site: int,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k / sqrt(K) + mask) v, and the probabilities.

    Args:
        q_BLHK, k_BMHK, v_BMHK: projections in the compute dtype.
        attention_mask_BM: 1 for a real key, 0 for padding.
        dropout_rate, dropout_keys_B, dropout_site: see `layers.dropout`; on the probabilities.

    Returns:
        (context_BLHK in q's dtype, probabilities_BHLM in float32, before dropout).
    """
    precision = layers.precision(q_BLHK.dtype)
    scores_BHLM = jnp.einsum(
        "blhk,bmhk->bhlm",
        q_BLHK * jnp.asarray(q_BLHK.shape[-1] ** -0.5, q_BLHK.dtype),
        k_BMHK,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    bias_BM = (1.0 - attention_mask_BM.astype(jnp.float32)) * MASKED_SCORE
    probabilities_BHLM = jax.nn.softmax(scores_BHLM + bias_BM[:, None, None, :], axis=-1)
    dropped_BHLM = layers.dropout(
        probabilities_BHLM.astype(v_BMHK.dtype), dropout_rate, dropout_keys_B, dropout_site
    )
    context_BLHK = jnp.einsum("bhlm,bmhk->blhk", dropped_BHLM, v_BMHK, precision=precision)
    return context_BLHK, probabilities_BHLM
