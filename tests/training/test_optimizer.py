"""LAMB, AdamW and the schedule, against the released formulas written out plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from albert_jax import config
from albert_jax.training import optimizer

NAMES = {
    "kernel": ("group", "inner", "hidden", "ffn"),
    "table": ("vocab", "embedding"),
    "norm": {"scale": ("hidden",)},
    "bias": ("ffn",),
}


def tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "kernel": draw(2, 3, 4, 5),
        "table": draw(7, 6),
        "norm": {"scale": draw(4)},
        "bias": draw(5),
    }


def released(name: str, cfg: config.OptimizerConfig, total: int, params: dict, grads: list[dict]):
    """Plain NumPy: one variable after the other, the parameter sets of a stack apart."""
    flat = {
        "kernel": params["kernel"],
        "table": params["table"],
        "scale": params["norm"]["scale"],
        "bias": params["bias"],
    }
    w = {k: np.array(v, np.float64) for k, v in flat.items()}
    m = {k: np.zeros_like(v) for k, v in w.items()}
    v = {k: np.zeros_like(x) for k, x in w.items()}
    for number, grad in enumerate(grads, start=1):
        g = {
            "kernel": grad["kernel"],
            "table": grad["table"],
            "scale": grad["norm"]["scale"],
            "bias": grad["bias"],
        }
        g = {k: np.array(x, np.float64) for k, x in g.items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        rate = cfg.learning_rate * (
            number / cfg.warmup_steps if number < cfg.warmup_steps else 1 - number / total
        )
        for k in w:
            clipped = g[k] * min(1.0, cfg.clip_norm / norm)
            m[k] = 0.9 * m[k] + 0.1 * clipped
            v[k] = 0.999 * v[k] + 0.001 * clipped**2
            u = m[k] / (np.sqrt(v[k]) + 1e-6)
            if k in ("kernel", "table"):
                u = u + cfg.weight_decay * w[k]
                if name == "lamb":
                    sets = [(i, j) for i in range(2) for j in range(3)] if k == "kernel" else [...]
                    for one in sets:
                        w_norm, u_norm = np.linalg.norm(w[k][one]), np.linalg.norm(u[one])
                        u[one] = u[one] * (w_norm / u_norm)
            w[k] = w[k] - rate * u
    return w


@pytest.mark.parametrize("name", ["lamb", "adamw"])
@pytest.mark.parametrize("clip_norm", [1.0, 50.0])
def test_updates_equal_the_released_formulas(name, clip_norm):
    cfg = config.OptimizerConfig(name=name, learning_rate=0.05, warmup_steps=3, clip_norm=clip_norm)
    tx = optimizer.optimizer(cfg, 20, NAMES)
    params = tree(0)
    grads = [tree(seed) for seed in range(1, 7)]
    expected = released(name, cfg, 20, params, grads)
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_allclose(params["kernel"], expected["kernel"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(params["table"], expected["table"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(params["norm"]["scale"], expected["scale"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(params["bias"], expected["bias"], rtol=2e-5, atol=1e-6)


def test_a_variable_of_zeros_gets_ratio_one():
    tx = optimizer.scale_by_trust_ratio({"w": True}, {"w": 0})
    updates, _ = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init({}), {"w": jnp.zeros(2)})
    np.testing.assert_allclose(updates["w"], [3.0, 4.0])
    updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init({}), {"w": jnp.array([3.0, 4.0])})
    np.testing.assert_allclose(updates["w"], [0.0, 0.0])


def test_schedule_of_the_published_recipe():
    rate = optimizer.learning_rate(config.OptimizerConfig(), total_steps=125_000)
    expected = {
        1: 0.00176 / 3125,
        1000: 0.00176 * 1000 / 3125,
        3124: 0.00176 * 3124 / 3125,
        3125: 0.00176 * (1 - 3125 / 125_000),
        62_500: 0.00088,
        125_000: 0.0,
    }
    for number, value in expected.items():
        np.testing.assert_allclose(rate(number), value, rtol=1e-5)


def test_corrected_moments_and_decay_from_the_warm_up_equal_pytorch_and_transformers():
    cfg = config.OptimizerConfig(
        name="adamw",
        learning_rate=0.05,
        warmup_steps=4,
        clip_norm=0.0,
        beta2=0.98,
        bias_correction=True,
        decay_from_warmup=True,
    )
    total, params, tx = (
        12,
        tree(0)["kernel"],
        optimizer.optimizer(cfg, 12, {"kernel": ("hidden", "ffn")}),
    )
    weight = torch.nn.Parameter(torch.from_numpy(np.array(params[0, 0])))
    theirs = torch.optim.AdamW(
        [weight], lr=0.05, betas=(0.9, 0.98), eps=1e-6, weight_decay=cfg.weight_decay
    )
    schedule = transformers.get_linear_schedule_with_warmup(theirs, cfg.warmup_steps, total)
    ours, rate = {"kernel": params[0, 0]}, optimizer.learning_rate(cfg, total)
    state = tx.init(ours)
    for number in range(1, total + 1):
        schedule.step()  # theirs counts from 0, where the rate is 0
        np.testing.assert_allclose(rate(number), theirs.param_groups[0]["lr"], rtol=1e-5, atol=1e-9)
        grad = tree(number)["kernel"][0, 0]
        updates, state = tx.update({"kernel": grad}, state, ours)
        ours = {"kernel": ours["kernel"] + updates["kernel"]}
        weight.grad = torch.from_numpy(np.array(grad))
        theirs.step()
    np.testing.assert_allclose(ours["kernel"], weight.detach().numpy(), rtol=2e-5, atol=1e-6)
    carried = optimizer.with_moments(tx.init(ours), *optimizer.moments(state), total)
    jax.tree.map(np.testing.assert_array_equal, carried, state)
