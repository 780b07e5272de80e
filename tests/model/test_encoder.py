"""Which parameters each depth uses, what they cost, and that one scan equals the layers applied by
hand.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from albert_jax import config
from albert_jax.model import encoder, layers, pretraining
from albert_jax.training import objectives

SMALL = config.ModelConfig(
    vocab_size=11,
    embedding_size=6,
    hidden_size=14,
    num_hidden_layers=6,
    num_attention_heads=2,
    intermediate_size=10,
    max_position_embeddings=8,
    initializer_range=0.4,
    dtype="float32",
    remat="none",
)


def inputs() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    ids_BL = jax.random.randint(jax.random.key(1), (3, 5), 0, 11)
    types_BL = jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]])
    mask_BL = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return ids_BL, types_BL, mask_BL, jnp.array([[1, 3, 4, 2], [2, 1, 0, 0], [4, 1, 2, 3]])


def init(cfg: config.ModelConfig, seed: int = 0):
    model = pretraining.PretrainingModel(cfg)
    from flax.core import meta

    return model, meta.unbox(model.init(jax.random.key(seed), *inputs())["params"])


@pytest.mark.parametrize(
    ("layers_", "attention_groups", "ffn_groups"),
    [(6, 1, 1), (6, 6, 6), (6, 1, 6), (6, 6, 1), (6, 2, 3), (6, 4, 1), (5, 3, 2), (1, 1, 1)],
)
@pytest.mark.parametrize("inner", [1, 2])
def test_scan_equals_the_layers_applied_by_hand(layers_, attention_groups, ffn_groups, inner):
    cfg = dataclasses.replace(
        SMALL,
        num_hidden_layers=layers_,
        attention_groups=attention_groups,
        ffn_groups=ffn_groups,
        inner_group_num=inner,
    )
    x_BLD = jax.random.normal(jax.random.key(2), (3, 5, 14))
    mask_BL = inputs()[2]
    stack = encoder.Encoder(cfg, jnp.dtype("float32"))
    from flax.core import meta

    params = meta.unbox(stack.init(jax.random.key(0), x_BLD, mask_BL)["params"])
    by_hand, states = x_BLD, []
    for depth in range(layers_):
        a, f = depth * attention_groups // layers_, depth * ffn_groups // layers_
        for i in range(inner):
            pick = lambda tree, group, i=i: jax.tree.map(lambda leaf: leaf[group, i], tree)  # noqa: E731
            by_hand, _ = encoder.AttentionBlock(cfg, jnp.dtype("float32")).apply(
                {"params": pick(params["attention"], a)}, by_hand, mask_BL, None
            )
            by_hand = encoder.FeedForwardBlock(cfg, jnp.dtype("float32")).apply(
                {"params": pick(params["ffn"], f)}, by_hand, None
            )
            states.append(by_hand)
    output = stack.apply({"params": params}, x_BLD, mask_BL, output_hidden_states=True)
    np.testing.assert_allclose(output.sequence_BLD, by_hand, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output.hidden_states_NBLD, jnp.stack(states), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("attention_groups", "ffn_groups"), [(1, 1), (6, 6), (1, 6), (2, 3)])
def test_runs_cover_every_depth_once_with_its_sets(attention_groups, ffn_groups):
    def sets(part: int | slice, length: int) -> list[int]:
        return [part] * length if isinstance(part, int) else list(range(part.start, part.stop))

    runs = encoder.runs(6, attention_groups, ffn_groups)
    attention = [s for run in runs for s in sets(run.attention, run.length)]
    ffn = [s for run in runs for s in sets(run.ffn, run.length)]
    assert attention == [i * attention_groups // 6 for i in range(6)]
    assert ffn == [i * ffn_groups // 6 for i in range(6)]
    if attention_groups in (1, 6) and ffn_groups in (1, 6):
        assert len(runs) == 1


@pytest.mark.parametrize(
    ("remat", "unroll"), [("dots", "no"), ("full", "no"), ("none", "yes"), ("dots", "yes")]
)
def test_rematerialisation_and_unrolling_change_no_gradient(remat, unroll):
    model, params = init(SMALL)
    again = pretraining.PretrainingModel(dataclasses.replace(SMALL, remat=remat, unroll=unroll))
    keys = jax.random.split(jax.random.key(5), 3)

    def gradient(model):
        def loss(params):
            return jnp.sum(jnp.square(model.apply({"params": params}, *inputs(), keys)[0]))

        return jax.grad(loss)(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4),
        gradient(again),
        gradient(model),
    )


@pytest.mark.parametrize(
    ("shape", "encoder_count", "whole_count"),
    [
        ((12, 768, 12), 11_683_584, 11_813_810),
        ((24, 1024, 16), 17_683_968, 17_847_474),
        ((24, 2048, 16), 58_724_864, 59_021_490),
        ((12, 4096, 64), 222_595_584, 223_158_450),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(shape, encoder_count, whole_count):
    depth, hidden, heads = shape
    cfg = config.ModelConfig(
        num_hidden_layers=depth,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    model = pretraining.PretrainingModel(cfg)
    params = jax.eval_shape(lambda: objectives.Pretraining(model).init_params(0))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(params) == whole_count
    assert count({k: params[k] for k in ("embeddings", "encoder", "pooler")}) == encoder_count


@pytest.mark.parametrize("sharing", ["all", "attention", "ffn", "none"])
def test_sharing_strategies_cost_what_the_formula_says(sharing):
    depth, hidden, ffn = SMALL.num_hidden_layers, SMALL.hidden_size, SMALL.intermediate_size
    attention_groups = 1 if sharing in ("all", "attention") else depth
    ffn_groups = 1 if sharing in ("all", "ffn") else depth
    cfg = dataclasses.replace(SMALL, attention_groups=attention_groups, ffn_groups=ffn_groups)
    _, params = init(cfg)
    attention_set = 4 * (hidden * hidden + hidden) + 2 * hidden
    ffn_set = hidden * ffn + ffn + ffn * hidden + hidden + 2 * hidden
    expected = attention_groups * attention_set + ffn_groups * ffn_set
    assert sum(leaf.size for leaf in jax.tree.leaves(params["encoder"])) == expected


def test_padding_reaches_no_real_position():
    model, params = init(SMALL)
    ids_BL, types_BL, mask_BL, positions = inputs()
    other_BL = jnp.where(mask_BL == 1, ids_BL, (ids_BL + 3) % 11)
    ours = model.apply({"params": params}, ids_BL, types_BL, mask_BL, positions)
    theirs = model.apply({"params": params}, other_BL, types_BL, mask_BL, positions)
    assert jnp.any(other_BL != ids_BL)
    real = mask_BL == 1
    np.testing.assert_array_equal(
        ours.encoder.sequence_BLD[real], theirs.encoder.sequence_BLD[real]
    )


def test_a_row_of_padding_alone_is_no_nan():
    model, params = init(SMALL)
    ids_BL, types_BL, _, positions = inputs()
    output = model.apply({"params": params}, ids_BL, types_BL, jnp.zeros_like(ids_BL), positions)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(output))


def test_attention_maps_are_distributions_over_real_tokens():
    model, params = init(SMALL)
    attentions = model.apply(
        {"params": params}, *inputs(), output_attentions=True
    ).encoder.attentions_NBHLM
    assert attentions.shape == (6, 3, 2, 5, 5)
    np.testing.assert_allclose(attentions.sum(-1), 1.0, rtol=1e-5)
    assert float(attentions[:, 1, :, :, 3:].max()) == 0.0


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = jnp.ones((40, 50, 60))
    keys = jax.random.split(jax.random.key(0), 40)
    y = layers.dropout(x, 0.1, keys, site=2)
    zeros = float(jnp.mean(y == 0))
    assert abs(zeros - 0.1) < 4 * np.sqrt(0.09 / x.size)
    np.testing.assert_allclose(np.unique(y), [0.0, 1 / 0.9], rtol=1e-6)
    assert jnp.any(y != layers.dropout(x, 0.1, keys, site=3))
    assert jnp.any(y[0] != y[1])


def test_dropout_of_a_row_does_not_depend_on_its_neighbours():
    x = jnp.ones((4, 6, 2))
    keys = jax.random.split(jax.random.key(0), 4)
    whole = layers.dropout(x, 0.5, keys, site=1)
    np.testing.assert_array_equal(whole[2:], layers.dropout(x[2:], 0.5, keys[2:], site=1))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_activations_are_those_of_their_published_names(activation):
    x = np.linspace(-4, 4, 101, dtype=np.float32)
    theirs = transformers.activations.ACT2FN[activation](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(layers.ACTIVATIONS[activation](x), theirs, rtol=1e-5, atol=1e-6)


def test_forward_pass_equals_pytorch_transformers():
    theirs = transformers.AlbertForPreTraining(
        transformers.AlbertConfig(
            vocab_size=11,
            embedding_size=6,
            hidden_size=14,
            num_hidden_layers=6,
            num_hidden_groups=2,
            inner_group_num=2,
            num_attention_heads=2,
            intermediate_size=10,
            max_position_embeddings=8,
            initializer_range=0.4,
            attn_implementation="eager",
        )
    ).eval()
    cfg = dataclasses.replace(
        SMALL, num_hidden_groups=2, inner_group_num=2, attention_groups=2, ffn_groups=2
    )
    params = from_pytorch(theirs)
    ids_BL, types_BL, mask_BL, positions = inputs()
    ours = pretraining.PretrainingModel(cfg).apply(
        {"params": params}, ids_BL, types_BL, mask_BL, positions
    )
    with torch.no_grad():
        output = theirs(*(torch.from_numpy(np.asarray(x)) for x in (ids_BL, mask_BL, types_BL)))
    logits_BPV = np.take_along_axis(
        output.prediction_logits.numpy(), np.asarray(positions)[..., None], axis=1
    )
    np.testing.assert_allclose(ours.masked_lm_logits_BPV, logits_BPV, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        ours.sentence_order_logits_B2, output.sop_logits.numpy(), rtol=1e-4, atol=1e-4
    )


def from_pytorch(model: transformers.AlbertForPreTraining) -> dict:
    weights = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def block(group: int, inner: int) -> dict:
        at = f"albert.encoder.albert_layer_groups.{group}.albert_layers.{inner}"
        return {
            "attention": {
                **{name: dense(f"{at}.attention.{name}") for name in ("query", "key", "value")},
                "output": dense(f"{at}.attention.dense"),
                "layer_norm": norm(f"{at}.attention.LayerNorm"),
            },
            "ffn": {
                "intermediate": dense(f"{at}.ffn"),
                "output": dense(f"{at}.ffn_output"),
                "layer_norm": norm(f"{at}.full_layer_layer_norm"),
            },
        }

    groups = [jax.tree.map(lambda *x: np.stack(x), block(g, 0), block(g, 1)) for g in range(2)]
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    return {
        "embeddings": {
            **{name: weights[f"albert.embeddings.{name}.weight"] for name in tables},
            "layer_norm": norm("albert.embeddings.LayerNorm"),
            "projection": dense("albert.encoder.embedding_hidden_mapping_in"),
        },
        "encoder": jax.tree.map(lambda *x: np.stack(x), *groups),
        "pooler": dense("albert.pooler"),
        "masked_lm": {
            "dense": dense("predictions.dense"),
            "layer_norm": norm("predictions.LayerNorm"),
            "bias": weights["predictions.bias"],
        },
        "sentence_order": dense("sop_classifier.classifier"),
    }
