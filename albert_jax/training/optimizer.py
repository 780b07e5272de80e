"""LAMB and AdamW as they were released with ALBERT, built from optax where optax does the same.

Source: google-research/albert lamb_optimizer.py and optimization.py. By option the moments are
corrected for their bias, and the decay begins after the warm-up, as in fairseq (RoBERTa), PyTorch
and Transformers (DistilBERT); and layers learn at rates that fall from one to the next (Howard and
Ruder 2018, arXiv:1801.06146, section 3.2; Clark et al. 2020, arXiv:2003.10555). Two parts are
written here because optax differs:
`scale_by_moments` (optax's Adam always corrects the bias of the moments, the released code never
does) and `scale_by_trust_ratio` (optax takes one norm of a whole array and cannot leave arrays out;
here each parameter set of a stack is a variable of its own, as it was in the released checkpoints,
and LayerNorm and biases keep ratio 1).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from albert_jax.config import ModelConfig, OptimizerConfig
from albert_jax.model.encoder import GradientWeights
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
    cfg: OptimizerConfig, total_steps: int, axis_names: Any, model: ModelConfig | None = None
) -> optax.GradientTransformation:
    """Clipping, moments, decay, (LAMB's ratio,) rates: gradients in, updates out, all float32.

    Args:
        cfg: which optimizer, and its numbers.
        total_steps: where the learning rate reaches 0.
        axis_names: for every parameter the tuple of its logical axis names.
        model: whose layers have rates of their own, where `cfg` says so.
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
    if model is not None and (
        has_layer_decay(cfg) or cfg.embedding_rate != 1 or cfg.head_rate != 1
    ):
        parts.append(_scale_by_place(cfg, total_steps, model))
    rate = learning_rate(cfg, total_steps)
    # optax counts finished updates.
    parts.append(optax.scale_by_learning_rate(lambda finished: rate(finished + 1)))
    return optax.chain(*parts)


def has_layer_decay(cfg: OptimizerConfig) -> bool:
    """Whether layers learn at different rates."""
    return cfg.layer_decay != 1.0


def gradient_weights(
    cfg: OptimizerConfig, total_steps: int, model: ModelConfig
) -> Callable[[jax.Array], GradientWeights]:
    """What the gradient through each depth counts in step number `step`, from 0, where layers learn
    at different rates.

    A set of parameters that serves several depths has one update, so there is nothing to give each
    depth a rate of its own, and an adaptive optimizer would undo a smaller gradient; what can decay
    is each depth's say in the direction. Weights have mean 1 over the depths of a set; where every
    depth has a set of its own they are all 1, and `optimizer` scales the updates instead. Under
    plain gradient descent both ways are one.
    """

    def weights(step: jax.Array) -> GradientWeights:
        rates_N = _depth_rates(cfg, total_steps, model.num_hidden_layers, step + 1)
        return GradientWeights(
            *(
                rates_N / _means_of_sets(rates_N, groups)[_sets(model.num_hidden_layers, groups)]
                for groups in (model.attention_groups, model.ffn_groups)
            )
        )

    return weights


def _scale_by_place(
    cfg: OptimizerConfig, total_steps: int, model: ModelConfig
) -> optax.GradientTransformation:
    """Each update times the rate of where it is made: embeddings, each set of a stack, heads.

    The rate of a set is the mean over its depths, and of the set at the whole end, 1.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        step = state.count + 1
        rates_N = _depth_rates(cfg, total_steps, model.num_hidden_layers, step)
        whole = 0 if cfg.layer_decay_from == "bottom" else -1

        def scaled(path: Any, u: jax.Array) -> jax.Array:
            if path[0].key == "encoder":
                groups = u.shape[0]
                means_G = _means_of_sets(rates_N, groups)
                return u * (means_G / means_G[whole]).reshape(-1, *[1] * (u.ndim - 1))
            if path[0].key != "embeddings":
                return u * cfg.head_rate
            # They lie one below the lowest layer, and their rate is told beside that of its set.
            sets_G = _means_of_sets(rates_N, max(model.attention_groups, model.ffn_groups))
            below = rates_N[0] if whole == 0 else rates_N[0] * _step_down(cfg, total_steps, step)
            return u * cfg.embedding_rate * (below / sets_G[whole])

        scaled_updates = jax.tree_util.tree_map_with_path(scaled, updates)
        return scaled_updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update
    )


def _step_down(cfg: OptimizerConfig, total_steps: int, step: jax.Array) -> jax.Array:
    """How much smaller the rate of one layer is than that of the next, in update `step` from 1."""
    left = jnp.ones((), jnp.float32)
    if cfg.layer_decay_share:
        left = jnp.maximum(0.0, 1.0 - (step - 1) / (cfg.layer_decay_share * total_steps))
    return jnp.exp(left * math.log(cfg.layer_decay))


def _depth_rates(cfg: OptimizerConfig, total_steps: int, depths: int, step: jax.Array) -> jax.Array:
    """The rate of each depth in update `step` from 1, float32 [N]; 1 at the whole end."""
    from_bottom_N = jnp.arange(depths, dtype=jnp.float32)
    steps_N = from_bottom_N if cfg.layer_decay_from == "bottom" else from_bottom_N[::-1]
    return _step_down(cfg, total_steps, step) ** steps_N


def _sets(depths: int, groups: int) -> np.ndarray:
    """Which set each depth uses, int [N]; see `model.encoder`."""
    return np.arange(depths) * groups // depths


def _means_of_sets(rates_N: jax.Array, groups: int) -> jax.Array:
    """The mean rate over the depths that each set serves, float32 [G]."""
    sets_N = _sets(rates_N.shape[0], groups)
    counts_G = np.bincount(sets_N, minlength=groups).astype(np.float32)
    return jnp.zeros(groups, jnp.float32).at[sets_N].add(rates_N) / counts_G


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
