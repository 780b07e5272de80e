"""The TPU kernels: their maths by JAX's interpreter on the CPU, and that real TPUs' compiler takes
them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from albert_jax.errors import UserError
from albert_jax.model import kernels

KERNELS = {"flash": kernels.flash_attention, "splash": kernels.splash_attention}
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
REAL_KEYS = (128, 90, 3)  # of three rows: full, padded, nearly all padding


def by_hand(q_BLD, k_BLD, v_BLD, g_BLD, num_heads):
    """Context and the gradients of sum(context * g), head by head in float64."""
    results = [np.zeros(q_BLD.shape) for _ in range(4)]
    size = q_BLD.shape[2] // num_heads
    for row, keys in enumerate(REAL_KEYS):
        for head in range(num_heads):
            at = (row, slice(None), slice(head * size, (head + 1) * size))
            q, k, v, g = (np.asarray(x, np.float64)[at] for x in (q_BLD, k_BLD, v_BLD, g_BLD))
            exp = np.exp(q @ k[:keys].T / np.sqrt(size))
            p = exp / exp.sum(1, keepdims=True)
            dp = g @ v[:keys].T
            ds = p * (dp - (p * dp).sum(1, keepdims=True)) / np.sqrt(size)
            results[0][at] = p @ v[:keys]
            results[1][at] = ds @ k[:keys]
            results[2][at][:keys] = ds.T @ q
            results[3][at][:keys] = p.T @ g
    return results


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "num_heads", "head_size"),
    [(jnp.float32, 4, 64), (jnp.float32, 2, 128), (jnp.bfloat16, 4, 64)],
)
def test_context_and_gradients_are_those_of_attention(name, dtype, num_heads, head_size):
    shape = (len(REAL_KEYS), 128, num_heads * head_size)
    mask_BL = jnp.array([[int(n < keys) for n in range(128)] for keys in REAL_KEYS])
    draws = jax.random.split(jax.random.key(1), 4)
    q, k, v, g = (jax.random.normal(key, shape, dtype) for key in draws)
    g *= mask_BL[..., None].astype(dtype)  # padded positions carry no loss

    context, gradients = jax.vjp(
        lambda q, k, v: KERNELS[name](q, k, v, mask_BL, num_heads, interpret=True), q, k, v
    )
    context *= mask_BL[..., None].astype(dtype)
    expected = by_hand(q, k, v, g, num_heads)
    expected[0] *= mask_BL[..., None]
    for got, want in zip((context, *gradients(g)), expected, strict=True):
        assert got.dtype == dtype
        scale = np.abs(want).max()
        np.testing.assert_allclose(
            np.asarray(got, np.float64) / scale, want / scale, atol=TOLERANCE[dtype], rtol=0
        )


@pytest.mark.parametrize("name", KERNELS)
def test_packed_segments_see_only_themselves(name):
    """Against each segment alone, in float64 by hand; in rows of 256, in blocks of queries."""
    shape, draws = (2, 256, 128), jax.random.split(jax.random.key(3), 4)
    q, k, v, g = (jax.random.normal(key, shape) for key in draws)
    segments = [[1] * 100 + [2] * 30 + [3] * 126, [1] * 4 + [2] * 200 + [0] * 52]
    segments_BL = jnp.array(segments)
    g *= (segments_BL > 0)[..., None].astype(g.dtype)
    got, gradients = jax.vjp(
        lambda q, k, v: KERNELS[name](q, k, v, segments_BL, 2, interpret=True, packed=True),
        q, k, v,
    )  # fmt: skip
    found = [np.asarray(x) for x in (got, *gradients(g))]
    for row, numbers in enumerate(segments):
        for segment in sorted(set(numbers) - {0}):
            mine = np.flatnonzero(np.array(numbers) == segment)
            for head in range(2):
                at = (row, slice(mine[0], mine[-1] + 1), slice(head * 64, head * 64 + 64))
                qs, ks, vs, gs = (np.asarray(x, np.float64)[at] for x in (q, k, v, g))
                exp = np.exp(qs @ ks.T / 8)
                p = exp / exp.sum(1, keepdims=True)
                dp = gs @ vs.T
                ds = p * (dp - (p * dp).sum(1, keepdims=True)) / 8
                wanted = (p @ vs, ds @ ks, ds.T @ qs, p.T @ gs)
                for ours, theirs in zip(found, wanted, strict=True):
                    atol = 1e-5 * np.abs(theirs).max()
                    np.testing.assert_allclose(ours[at], theirs, rtol=0, atol=atol)


def test_queries_worked_on_in_blocks_add_up():
    """Rows of 640 are cut into blocks of 128 queries, whose gradients of k and v are summed."""
    shape, draws = (1, 640, 128), jax.random.split(jax.random.key(2), 4)
    q, k, v, g = (jax.random.normal(key, shape) for key in draws)
    mask_BL = jnp.ones((1, 640), jnp.int32)

    def plain(q, k, v):
        p = jax.nn.softmax(jnp.einsum("blk,bmk->blm", q, k) / np.sqrt(128), axis=-1)
        return jnp.einsum("blm,bmk->blk", p, v)

    want, plain_gradients = jax.vjp(plain, q, k, v)
    got, gradients = jax.vjp(
        lambda q, k, v: kernels.flash_attention(q, k, v, mask_BL, 1, True), q, k, v
    )
    for a, b in zip((got, *gradients(g)), (want, *plain_gradients(g)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("length", "heads", "size", "field"),
    [
        (100, 2, 64, "data.max_seq_length=100"),
        (2048, 2, 64, "data.max_seq_length=2048"),
        (128, 2, 48, "model.num_attention_heads = 48"),
        (128, 3, 64, "model.num_attention_heads"),
    ],
)
def test_shapes_no_kernel_is_made_for_are_refused(name, length, heads, size, field):
    x = jnp.zeros((1, length, heads * size))
    with pytest.raises(UserError, match=field):
        KERNELS[name](x, x, x, jnp.ones((1, length), jnp.int32), heads)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_xxlarge_on_real_chips(topology):
    """Forward and gradient, 8 rows of 512 with 64 heads of 64 a chip, all mesh axes manual."""
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(4, 1, 1), ("data", "fsdp", "tensor"))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((32, 512, 4096), jnp.bfloat16, sharding=rows)
    mask = jax.ShapeDtypeStruct((32, 512), jnp.int32, sharding=rows)

    def both(q, k, v, g, mask):
        results = []
        for kernel in KERNELS.values():
            context, vjp = jax.vjp(lambda q, k, v, f=kernel: f(q, k, v, mask, 64), q, k, v)
            results.append((context, vjp(g)))
        return results

    spec = PartitionSpec("data")
    program = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    compiled = jax.jit(program).trace(x, x, x, x, mask).lower(lowering_platforms=("tpu",)).compile()
    hlo = compiled.as_text()
    assert "flash_forward" in hlo
    assert "flash_backward" in hlo
    # Scores of one row of one layer are 64 MiB; results are 8 x 32 MiB, splash's copies as many.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.8 * 2**30
