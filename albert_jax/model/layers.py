"""The small parts that every block is made of: dense, LayerNorm, dropout, activations, initial
values.

Parameters are float32 and carry logical axis names (`training.sharding` maps them to the mesh);
matrix products run in the module's `dtype`, statistics in float32.

Logical axes: vocab, position, type, embedding (E), hidden (D), heads (H*K), ffn (F), label, and for
    stacks of
parameter sets `group` and `inner`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# tanh approximation, erf, relu: the names of ALBERT's published configs. [google-research/albert
# modeling.py]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


def named(init: nn.initializers.Initializer, *axes: str) -> nn.initializers.Initializer:
    """`init` with a logical name for each axis of what it makes."""
    return nn.with_logical_partitioning(init, axes)


def placed(x: jax.Array, *axes: str) -> jax.Array:
    """x, its axes named for the mesh; without a mesh around, x as it is."""
    return nn.spmd.with_logical_constraint(x, tuple(f"act_{axis}" for axis in axes))


def truncated_normal(sigma: float) -> nn.initializers.Initializer:
    """Normal of standard deviation `sigma` before it is cut at two of them, as the released code's.

    JAX's own initializer widens the normal so that sigma holds after the cut; TensorFlow's does
    not.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return sigma * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)

    return init


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 means float32 on every chip: TPUs and GPUs otherwise round the factors."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Dense(nn.Module):
    """x [..., in] @ kernel [in, out] + bias [out], in `dtype`."""

    features: int
    axes: tuple[str, str]
    sigma: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [..., features] in `dtype`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", named(truncated_normal(self.sigma), *self.axes), shape)
        bias = self.param("bias", named(nn.initializers.zeros_init(), self.axes[1]), shape[1:])
        x = jnp.dot(
            x.astype(self.dtype), kernel.astype(self.dtype), precision=precision(self.dtype)
        )
        return x + jnp.expand_dims(bias.astype(self.dtype), range(x.ndim - 1))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, computed in "
    "float32."""

    axis: str
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x's shape in `dtype`."""
        shape = (x.shape[-1],)
        scale = self.param("scale", named(nn.initializers.ones_init(), self.axis), shape)
        bias = self.param("bias", named(nn.initializers.zeros_init(), self.axis), shape)
        leading = range(x.ndim - 1)
        x = x.astype(jnp.float32)
        x -= jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        # Not optional at epsilon 1e-12: a constant row has variance 0, and float32 keeps 1e-12.
        x *= jax.lax.rsqrt(variance + self.epsilon)
        return (x * jnp.expand_dims(scale, leading) + jnp.expand_dims(bias, leading)).astype(
            self.dtype
        )


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None, site: int) -> jax.Array:
    """x with a share `rate` of its entries zeroed and the rest scaled up; x itself without keys or
    at rate 0.

    Row b's mask is a function of (keys_B[b], site) alone: a batch may be split over devices and
    microbatches in any way and draws the same masks. 16 random bits decide an entry, half the price
    of the usual 32; the rate is met to 1e-5.

    Args:
        x: [B, ...], an even number of entries a row.
        rate: in [0, 1).
        keys_B: a key for each row, or None for no dropout.
        site: which dropout of the layer this is.
    """
    if keys_B is None or rate == 0.0:
        return x
    words = x[0].size // 2

    def bits(key: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(key, site), (words,), jnp.uint32)

    bits_BW = jax.vmap(bits)(keys_B)
    drawn = jax.lax.bitcast_convert_type(bits_BW, jnp.uint16).reshape(x.shape)
    keep = drawn >= jnp.uint16(round(rate * 65536))
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))
