"""LAMB and AdamW as they were released with ALBERT, built from optax where optax does the same.

Source: google-research/albert lamb_optimizer.py and optimization.py. By option the moments are
corrected for their bias, and the decay begins after the warm-up, as in fairseq (RoBERTa), PyTorch
and Transformers (DistilBERT). Two parts are written here because optax differs:
`scale_by_moments` (optax's Adam always corrects the bias of the moments, the released code never
does) and `scale_by_trust_ratio` (optax takes one norm of a whole array and cannot leave arrays out;
here each parameter set of a stack is a variable of its own, as it was in the released checkpoints,
and LayerNorm and biases keep ratio 1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from albert_jax.config import OptimizerConfig
from albert_jax.model.layers import STACK_AXES


def learning_rate(cfg: OptimizerConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """The rate of update number `step`, counted from 1: up to the peak over the warm-up, then down
    to 0.

    The decay counts from the first update, not from the end of the warm-up, so the rate drops a
    little there; with `decay_from_warmup` it does not. [optimization.py; that the first update has
    number 1 is what checkpoints trained by the released code show.]
    """
    first = cfg.warmup_steps if cfg.decay_from_warmup else 0

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        passed = (jnp.minimum(step, total_steps) - first) / max(total_steps - first, 1)
        decayed = cfg.learning_rate * (1.0 - passed)
        warming = cfg.learning_rate * step / max(cfg.warmup_steps, 1)
        return jnp.where(step < cfg.warmup_steps, warming, decayed)

    return schedule


def optimizer(
    cfg: OptimizerConfig, total_steps: int, axis_names: Any
) -> optax.GradientTransformation:
    """Clipping, moments, decay, (LAMB's ratio,) rate: gradients in, updates out, all float32.

    Args:
        cfg: which optimizer, and its numbers.
        total_steps: where the learning rate reaches 0.
        axis_names: for every parameter the tuple of its logical axis names.
    """
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in ("bias", "scale"), axis_names, is_leaf=_is_names
    )
    stack_axes = jax.tree.map(
        lambda names: sum(name in STACK_AXES for name in names), axis_names, is_leaf=_is_names
    )
    scale_by = optax.scale_by_adam if cfg.bias_correction else scale_by_moments
    parts = [
        scale_by(cfg.beta1, cfg.beta2, cfg.epsilon),
        optax.add_decayed_weights(cfg.weight_decay, decayed),
    ]
    if cfg.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(cfg.clip_norm))
    if cfg.name == "lamb":
        parts.append(scale_by_trust_ratio(decayed, stack_axes))
    rate = learning_rate(cfg, total_steps)
    # optax counts finished updates.
    parts.append(optax.scale_by_learning_rate(lambda finished: rate(finished + 1)))
    return optax.chain(*parts)


class MomentsState(NamedTuple):
    """First and second moments, shaped as the parameters."""

    mu: Any
    nu: Any


def scale_by_moments(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """m / (sqrt(v) + epsilon), the moments as they are: no bias correction."""

    def init(params: Any) -> MomentsState:
        return MomentsState(
            jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MomentsState]:
        del params
        mu = jax.tree.map(lambda m, g: beta1 * m + (1.0 - beta1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1.0 - beta2) * jnp.square(g), state.nu, updates)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), mu, nu)
        return scaled, MomentsState(mu, nu)

    return optax.GradientTransformation(init, update)


# Without and with correction of their bias.
_WITH_MOMENTS = (MomentsState, optax.ScaleByAdamState)


def moments(opt_state: Any) -> tuple[Any, Any]:
    """The first and second moments in a state of `optimizer`, as trees like the parameters."""
    [found] = [part for part in opt_state if isinstance(part, _WITH_MOMENTS)]
    return found.mu, found.nu


def with_moments(opt_state: Any, mu: Any, nu: Any, step: int) -> Any:
    """A state of `optimizer` after `step` updates that led to these moments."""

    def replaced(part: Any) -> Any:
        if isinstance(part, _WITH_MOMENTS):
            part = part._replace(mu=jax.tree.map(jnp.asarray, mu), nu=jax.tree.map(jnp.asarray, nu))
        if "count" in getattr(part, "_fields", ()):
            part = part._replace(count=jnp.asarray(step, jnp.int32))
        return part

    return tuple(replaced(part) for part in opt_state)


def scale_by_trust_ratio(adapted: Any, stack_axes: Any) -> optax.GradientTransformation:
    """Each variable's update times |w| / |u|, or 1 where either is 0.

    Args:
        adapted: for every array, whether it gets a ratio at all.
        stack_axes: for every array, how many leading axes count variables rather than belong to
            one.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def scaled(u: jax.Array, w: jax.Array, adapt: bool, stacked: int) -> jax.Array:
            if not adapt:
                return u
            axes = tuple(range(stacked, u.ndim))
            w_norm = jnp.sqrt(jnp.sum(jnp.square(w), axis=axes, keepdims=True))
            u_norm = jnp.sqrt(jnp.sum(jnp.square(u), axis=axes, keepdims=True))
            usable = (w_norm > 0) & (u_norm > 0)
            return u * jnp.where(usable, w_norm / jnp.where(usable, u_norm, 1.0), 1.0)

        return jax.tree.map(scaled, updates, params, adapted, stack_axes), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _is_names(leaf: object) -> bool:
    return isinstance(leaf, tuple)
