"""Embeddings and the stack of layers: one scan over one layer, whatever is shared between depths.

ALBERT shares one set of parameters over all depths, BERT none, and the ALBERT paper's ablations the
attention or the feed-forward half alone (Lan et al. 2020, arXiv:1909.11942, table 4). Here each
half has its own number of sets, `attention_groups` and `ffn_groups`: depth i uses set floor(i *
groups / depths). Sets lie stacked in arrays with two leading axes, [group, inner, ...]; `inner`
counts the blocks inside one layer (`inner_group_num`). The depths are cut into runs in which each
half either stays with one set (which the scan then holds fixed) or takes the next set at each depth
(which the scan then walks over), so that no depth ever indexes into a stack.

The loop of a scan compiles in the same time at any depth, but keeps what the backward pass needs in
stacks, which a CPU fills and reads slowly: there the loop is written out (`model.unroll`).

Letters: B batch, L sequence length, E embedding size, D hidden size, H heads, K size of a head, F
    feed-forward size,
N depths, I blocks inside a layer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from albert_jax.config import ModelConfig
from albert_jax.model import attention, layers

_ATTENTION_DROPOUT, _ATTENTION_OUTPUT_DROPOUT, _FFN_OUTPUT_DROPOUT, _EMBEDDING_DROPOUT = range(4)

# What a scan may keep for the backward pass instead of computing it again. "dots" keeps what is
# dear to make and small to keep: products with weights, sums over shards, and attention's result,
# but not its scores.
_DOTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("context", "reduced"),
)
_REMAT_POLICIES = {
    "auto": _DOTS,  # where nobody chose by a device's memory
    "dots": _DOTS,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class EncoderOutput(NamedTuple):
    """What the encoder returns; the last two are None unless asked for."""

    sequence_BLD: jax.Array
    hidden_states_NBLD: jax.Array | None  # after each block, N*I of them
    attentions_NBHLM: jax.Array | None  # probabilities, float32


class GradientWeights(NamedTuple):
    """What the gradient through each depth counts, float32 [N]; see `optimizer.depth_weights`."""

    attention_N: jax.Array
    ffn_N: jax.Array


@jax.custom_vjp
def weighed_gradient(tree: Any, weight: jax.Array) -> Any:
    """`tree` as it is; on the way back its gradient times `weight`, a scalar."""
    del weight
    return tree


def _weigh(weight: jax.Array, gradient: Any) -> tuple[Any, jax.Array]:
    weighed = jax.tree.map(lambda leaf: leaf * weight.astype(leaf.dtype), gradient)
    return weighed, jnp.zeros_like(weight)


weighed_gradient.defvjp(lambda tree, weight: (tree, weight), _weigh)


class Embeddings(nn.Module):
    """Word, position and segment embeddings, summed, normalised, dropped out; then projected where
    E is not D.
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        input_ids_BL: jax.Array,
        token_type_ids_BL: jax.Array,
        dropout_keys_B: jax.Array | None,
        words_BLE: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (x_BLD in `dtype`, the word table in float32, for the head that is tied to it).

        `words_BLE`, where given, stands in for the rows that the ids look up; `positions_BL` are
        0, 1, 2, ... in every row where they are not given.
        """
        cfg = self.config
        normal = layers.truncated_normal(cfg.initializer_range)

        def table(name: str, axis: str, rows: int) -> jax.Array:
            init = layers.named(normal, axis, "embedding")
            return self.param(name, init, (rows, cfg.embedding_size))

        words_VE = table("word_embeddings", "vocab", cfg.vocab_size)
        positions = table("position_embeddings", "position", cfg.max_position_embeddings)
        end = cfg.position_offset + input_ids_BL.shape[1]
        e_BLE = words_VE[input_ids_BL] if words_BLE is None else words_BLE
        if cfg.type_vocab_size:
            types = table("token_type_embeddings", "type", cfg.type_vocab_size)
            e_BLE += types[token_type_ids_BL]
        if positions_BL is None:
            e_BLE += positions[None, cfg.position_offset : end]
        else:
            e_BLE += positions[cfg.position_offset + positions_BL]
        e_BLE = layers.LayerNorm("embedding", cfg.layer_norm_eps, self.dtype, name="layer_norm")(
            e_BLE
        )
        e_BLE = layers.dropout(e_BLE, cfg.hidden_dropout_prob, dropout_keys_B, _EMBEDDING_DROPOUT)
        if cfg.embedding_size == cfg.hidden_size and not cfg.project_embeddings:
            return e_BLE, words_VE
        project = layers.Dense(
            cfg.hidden_size,
            ("embedding", "hidden"),
            cfg.initializer_range,
            self.dtype,
            name="projection",
        )
        return project(e_BLE), words_VE


class AttentionBlock(nn.Module):
    """LN(x + drop(attention(x))): the first half of a layer, post-LN.

    With `shards` > 1 this device has 1/shards of the heads.
    """

    config: ModelConfig
    dtype: jnp.dtype
    shards: int = 1

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        attention_mask_BL: jax.Array,
        dropout_keys_B: jax.Array | None,
        output_attentions: bool = False,
        segment_ids_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns (x_BLD, probabilities_BHLM in float32 if asked for)."""
        cfg = self.config
        heads = cfg.num_attention_heads // self.shards
        spread_BLD = layers.to_shards(x_BLD, self.shards)

        def project(name: str) -> jax.Array:
            # Kernel and result keep H*K as one axis: chips pad a last axis of 64 to 128.
            return layers.Dense(
                cfg.hidden_size // self.shards,
                ("hidden", "heads"),
                cfg.initializer_range,
                self.dtype,
                name=name,
            )(spread_BLD)

        context_BLD, probabilities_BHLM = attention.attend(
            "xla" if output_attentions else cfg.attention,
            project("query"),
            project("key"),
            project("value"),
            attention_mask_BL,
            heads,
            self._dropout(dropout_keys_B, heads),
            segment_ids_BL,
        )
        out_BLD = layers.Dense(
            cfg.hidden_size,
            ("heads", "hidden"),
            cfg.initializer_range,
            self.dtype,
            self.shards,
            name="output",
        )(context_BLD)
        out_BLD = layers.dropout(
            out_BLD, cfg.hidden_dropout_prob, dropout_keys_B, _ATTENTION_OUTPUT_DROPOUT
        )
        norm = layers.LayerNorm("hidden", cfg.layer_norm_eps, self.dtype, name="layer_norm")
        return norm(x_BLD + out_BLD), probabilities_BHLM

    def _dropout(
        self, keys_B: jax.Array | None, heads: int
    ) -> Callable[[jax.Array], jax.Array] | None:
        """Dropout of probabilities_BHLM, each head's by its own number, wherever it is computed."""
        rate = self.config.attention_probs_dropout_prob
        if keys_B is None or rate == 0.0:
            return None
        numbers_H = jnp.arange(heads)
        if self.shards > 1:
            numbers_H += jax.lax.axis_index(layers.TENSOR_AXIS) * heads
        of_heads = jax.vmap(jax.random.fold_in, (None, 0))
        keys_BH = jax.vmap(of_heads, (0, None))(keys_B, numbers_H)
        return lambda x_BHLM: layers.dropout(x_BHLM, rate, keys_BH, _ATTENTION_DROPOUT)


class FeedForwardBlock(nn.Module):
    """LN(x + drop(dense(act(dense(x))))): the second half of a layer, post-LN.

    With `shards` > 1 this device has 1/shards of the columns between the two products.
    """

    config: ModelConfig
    dtype: jnp.dtype
    shards: int = 1

    @nn.compact
    def __call__(self, x_BLD: jax.Array, dropout_keys_B: jax.Array | None) -> jax.Array:
        """Returns x_BLD."""
        cfg = self.config
        h_BLF = layers.Dense(
            cfg.intermediate_size // self.shards,
            ("hidden", "ffn"),
            cfg.initializer_range,
            self.dtype,
            name="intermediate",
        )(layers.to_shards(x_BLD, self.shards))
        h_BLF = layers.ACTIVATIONS[cfg.hidden_act](h_BLF)
        out_BLD = layers.Dense(
            cfg.hidden_size,
            ("ffn", "hidden"),
            cfg.initializer_range,
            self.dtype,
            self.shards,
            name="output",
        )(h_BLF)
        out_BLD = layers.dropout(
            out_BLD, cfg.hidden_dropout_prob, dropout_keys_B, _FFN_OUTPUT_DROPOUT
        )
        norm = layers.LayerNorm("hidden", cfg.layer_norm_eps, self.dtype, name="layer_norm")
        return norm(x_BLD + out_BLD)


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring depths that one scan can do.

    Attributes:
        length: how many depths.
        attention, ffn: the half's set, held fixed (an int), or the sets it walks over (a slice).
    """

    length: int
    attention: int | slice
    ffn: int | slice


def runs(depths: int, attention_groups: int, ffn_groups: int) -> list[Run]:
    """The fewest runs in which each half is either fixed or walks one set a depth."""
    attention_sets = [depth * attention_groups // depths for depth in range(depths)]
    ffn_sets = [depth * ffn_groups // depths for depth in range(depths)]

    def strides(depth: int) -> tuple[int, int]:
        return (
            attention_sets[depth + 1] - attention_sets[depth],
            ffn_sets[depth + 1] - ffn_sets[depth],
        )

    result, start = [], 0
    while start < depths:
        stop = start + 1
        while stop < depths and strides(stop - 1) == strides(start):
            stop += 1

        def part(sets: list[int], start: int = start, stop: int = stop) -> int | slice:
            first, last = sets[start], sets[stop - 1]
            return first if first == last else slice(first, last + 1)

        result.append(Run(stop - start, part(attention_sets), part(ffn_sets)))
        start = stop
    return result


class Encoder(nn.Module):
    """`num_hidden_layers` layers over x_BLD, each `inner_group_num` blocks of attention and feed-
    forward; each layer may be split over `shards` devices.
    """

    config: ModelConfig
    dtype: jnp.dtype
    shards: int = 1

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        attention_mask_BL: jax.Array,
        dropout_keys_B: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        gradient_weights: GradientWeights | None = None,
        segment_ids_BL: jax.Array | None = None,
    ) -> EncoderOutput:
        """Runs the stack; each depth draws its own dropout. Segments, where given, do not see each
        other (see `attention.attend`).

        Where `gradient_weights` are given, what reaches a set of parameters through each depth is
        multiplied by that depth's weight.
        """
        cfg = self.config
        attention_block = AttentionBlock(cfg, self.dtype, self.shards, parent=None)
        ffn_block = FeedForwardBlock(cfg, self.dtype, self.shards, parent=None)
        attention_sets = self.param(
            "attention",
            _stacked(attention_block, cfg.attention_groups, cfg),
            x_BLD,
            attention_mask_BL,
            None,
        )
        ffn_sets = self.param("ffn", _stacked(ffn_block, cfg.ffn_groups, cfg), x_BLD, None)

        run_attention: Any = attention_block.apply
        run_ffn: Any = ffn_block.apply

        def layer(
            x_BLD: jax.Array, attention_I: Any, ffn_I: Any, depth: jax.Array
        ) -> tuple[jax.Array, Any]:
            if gradient_weights is not None:
                attention_I = weighed_gradient(attention_I, gradient_weights.attention_N[depth])
                ffn_I = weighed_gradient(ffn_I, gradient_weights.ffn_N[depth])
            hidden_states, attentions = [], []
            for inner in range(cfg.inner_group_num):
                keys_B = None
                if dropout_keys_B is not None:
                    site = depth * cfg.inner_group_num + inner
                    keys_B = jax.vmap(jax.random.fold_in, (0, None))(dropout_keys_B, site)
                x_BLD, probabilities_BHLM = run_attention(
                    {"params": _at(attention_I, inner)},
                    x_BLD,
                    attention_mask_BL,
                    keys_B,
                    output_attentions,
                    segment_ids_BL,
                )
                x_BLD = run_ffn({"params": _at(ffn_I, inner)}, x_BLD, keys_B)
                hidden_states.append(x_BLD)
                attentions.append(probabilities_BHLM)
            return x_BLD, (
                jnp.stack(hidden_states) if output_hidden_states else None,
                jnp.stack(attentions) if output_attentions else None,
            )

        if cfg.remat != "none":
            # In a loop nothing can be taken from before it; written out, it could.
            layer = jax.checkpoint(
                layer, policy=_REMAT_POLICIES[cfg.remat], prevent_cse=cfg.unroll == "yes"
            )

        captured, depth = [], 0
        for run in runs(cfg.num_hidden_layers, cfg.attention_groups, cfg.ffn_groups):
            in_axes: Any = (
                0 if isinstance(run.attention, slice) else nn.broadcast,
                0 if isinstance(run.ffn, slice) else nn.broadcast,
                0,
            )
            scan: Any = nn.scan(
                lambda _, x, attention_I, ffn_I, depth: layer(x, attention_I, ffn_I, depth),
                in_axes=in_axes,
                length=run.length,
                unroll=run.length if cfg.unroll == "yes" else 1,
            )
            x_BLD, outputs = scan(
                self,
                x_BLD,
                _at(attention_sets, run.attention),
                _at(ffn_sets, run.ffn),
                jnp.arange(depth, depth + run.length),
            )
            captured.append(outputs)
            depth += run.length

        def joined(which: int, wanted: bool) -> jax.Array | None:
            if not wanted:
                return None
            stacked = jnp.concatenate([outputs[which] for outputs in captured])
            return stacked.reshape(-1, *stacked.shape[2:])

        return EncoderOutput(x_BLD, joined(0, output_hidden_states), joined(1, output_attentions))


def restarting_positions(segment_ids_BL: jax.Array, begins_BS: jax.Array) -> jax.Array:
    """Positions of packed rows, which begin at 0 in each segment; int32 [B, L].

    Args:
        segment_ids_BL: 1, 2, 3, ...; 0 on padding.
        begins_BS: where each segment begins, from the first.
    """
    number_BL = jnp.maximum(segment_ids_BL - 1, 0)
    places_L = jnp.arange(segment_ids_BL.shape[1], dtype=jnp.int32)
    return places_L[None] - jnp.take_along_axis(begins_BS, number_BL, axis=1)


def pooled(cfg: ModelConfig, dtype: jnp.dtype, first_BD: jax.Array) -> jax.Array:
    """One vector for a sequence: tanh(dense(first position)); for DistilBERT, relu(dense(...)).

    Of packed rows [B, S, D]. To be called inside a module, whose `pooler` the dense layer becomes.
    """
    dense = layers.Dense(
        cfg.hidden_size, ("hidden", "pooled"), cfg.initializer_range, dtype, name="pooler"
    )
    activation = jax.nn.relu if cfg.model_type == "distilbert" else jnp.tanh
    return activation(dense(first_BD))


def _at(sets: Any, index: int | slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], sets)


def _stacked(block: nn.Module, groups: int, cfg: ModelConfig) -> Any:
    """An initializer for groups x inner sets of the block's parameters, their names with two axes
    more.
    """

    def init(key: jax.Array, *inputs: Any) -> Any:
        keys = jax.random.split(key, (groups, cfg.inner_group_num))
        one = lambda key: block.init(key, *inputs)["params"]  # noqa: E731
        params = jax.vmap(jax.vmap(one))(keys)
        for axis, name in enumerate(("group", "inner")):
            params = meta.add_axis(params, axis, {nn.PARTITION_NAME: name})
        return params

    return init
