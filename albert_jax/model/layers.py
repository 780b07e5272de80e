"""The small parts that every block is made of: dense, LayerNorm, dropout, activations, initial
values.

Parameters are float32 and carry logical axis names (`training.sharding` maps them to the mesh);
matrix products run in the module's `dtype`, statistics in float32.

Logical axes: vocab, position, type, embedding (E), hidden (D), heads (H*K), ffn (F), pooled, label,
and for stacks of parameter sets `group` and `inner`.

A layer may be split over the devices of one mesh axis (Shoeybi et al. 2019, arXiv:1909.08053,
section 3): each holds some heads and some feed-forward columns. Between `to_shards` and
`from_shards` arrays differ from device to device, everywhere else they are the same on all.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# tanh approximation, erf, relu: the names of ALBERT's published configs. [google-research/albert
# modeling.py]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}

STACK_AXES = ("group", "inner")  # logical axes that count parameter sets
TENSOR_AXIS = "tensor"  # the mesh axis over which a layer may be split


def named(init: nn.initializers.Initializer, *axes: str) -> nn.initializers.Initializer:
    """`init` with a logical name for each axis of what it makes."""
    return nn.with_logical_partitioning(init, axes)


def to_shards(x: jax.Array, shards: int) -> jax.Array:
    """x itself, on its way into a part split `shards` ways; its gradient is summed over them."""
    return _to_shards(x) if shards > 1 else x


def from_shards(x: jax.Array, shards: int) -> jax.Array:
    """The sum of each shard's part of x; its gradient goes to each of them whole.

    The sum is named "reduced": a rematerialisation policy can keep it from being made again.
    """
    return checkpoint_name(_from_shards(x), "reduced") if shards > 1 else x


@jax.custom_vjp
def _to_shards(x: jax.Array) -> jax.Array:
    return x


_to_shards.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.psum(g, TENSOR_AXIS),))


@jax.custom_vjp
def _from_shards(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, TENSOR_AXIS)


_from_shards.defvjp(lambda x: (jax.lax.psum(x, TENSOR_AXIS), None), lambda _, g: (g,))


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
    """x [..., in] @ kernel [in, out] + bias [out], in `dtype`.

    With `summed_shards` > 1 x and the kernel are one shard's columns and rows, and the products of
    all shards are summed before the bias.
    """

    features: int
    axes: tuple[str, str]
    sigma: float
    dtype: jnp.dtype
    summed_shards: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns [..., features] in `dtype`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", named(truncated_normal(self.sigma), *self.axes), shape)
        bias = self.param("bias", named(nn.initializers.zeros_init(), self.axes[1]), shape[1:])
        x = jnp.dot(
            x.astype(self.dtype), kernel.astype(self.dtype), precision=precision(self.dtype)
        )
        x = from_shards(x, self.summed_shards)
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


def dropout(x: jax.Array, rate: float, keys: jax.Array | None, site: int) -> jax.Array:
    """x with a share `rate` of its entries zeroed and the rest scaled up; x itself without keys or
    at rate 0.

    The mask of x[i] is a function of (keys[i], site) alone: a batch may be split over devices and
    microbatches in any way and draws the same masks. 16 random bits decide an entry, half the price
    of the usual 32; the rate is met to 1e-5.

    Args:
        x: any array; keys' shape is that of its leading axes.
        rate: in [0, 1).
        keys: a key for each row [B] (or each row and head [B, H]), or None for no dropout.
        site: which dropout of the layer this is.
    """
    if keys is None or rate == 0.0:
        return x
    entries = math.prod(x.shape[keys.ndim :])

    def bits(key: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(key, site), ((entries + 1) // 2,), jnp.uint32)

    words = jax.vmap(bits)(keys.reshape(-1))
    drawn = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(words.shape[0], -1)
    keep = drawn[:, :entries].reshape(x.shape) >= jnp.uint16(round(rate * 65536))
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))
