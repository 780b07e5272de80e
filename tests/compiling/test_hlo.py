"""Counting in optimised TPU programs, against hand arithmetic on small real ones.

The program of `scanned` runs on 2 x 2 chips: a scan of `TURNS` products with an all-reduce in each
turn, and around it one gather, one reduce-scatter and one all-reduce.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from albert_jax.compiling import collectives, hlo, jaxpr, topology

pytestmark = pytest.mark.skipif(
    not topology.libtpu_installed(), reason="needs the TPU compiler (libtpu)"
)

ROWS, WIDTH, TURNS = 128, 256, 5  # rows of one chip
PRODUCT = 2 * ROWS * WIDTH * WIDTH
CHIPS = 4


@pytest.fixture(scope="module")
def on():
    topology.quiet_libtpu()
    return topology.get("v5e:2x2")


@pytest.fixture(scope="module")
def mesh(on):
    return Mesh(np.asarray(on.devices).reshape(2, 2), ("data", "fsdp"))


def compiled(function, *shapes):
    """(trace, parsed program) of a jitted function of arrays that have these shapes."""
    traced = function.trace(*shapes)
    return traced, hlo.Module(traced.lower(lowering_platforms=("tpu",)).compile().as_text())


@pytest.fixture(scope="module")
def scanned(mesh):
    def step(x, part, total):
        weights = jax.lax.all_gather(part, "fsdp", axis=0, tiled=True)

        def turn(carry, _):
            x, total = carry
            y = jnp.tanh(x @ weights.astype(jnp.bfloat16))
            gradient = jnp.einsum("rk,rn->kn", x, y, preferred_element_type=jnp.float32)
            return (y + jax.lax.psum(y, "data") * 1e-3, total + gradient), None

        (y, total), _ = jax.lax.scan(turn, (x, total), None, length=TURNS)
        scattered = jax.lax.psum_scatter(total, "fsdp", scatter_dimension=0, tiled=True)
        with jax.named_scope("optimizer"):
            update = jnp.sqrt(jnp.abs(scattered)) + 1.0
        return y, update, jax.lax.psum(total, ("data", "fsdp"))

    rows, part = PartitionSpec(("data", "fsdp")), PartitionSpec("fsdp")
    function = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(rows, part, PartitionSpec()),
        out_specs=(rows, part, PartitionSpec()),
        check_vma=False,
    )

    def shape(sizes, dtype, spec):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    return compiled(
        jax.jit(function),
        shape((ROWS * CHIPS, WIDTH), jnp.bfloat16, rows),
        shape((WIDTH, WIDTH), jnp.float32, part),
        shape((WIDTH, WIDTH), jnp.float32, PartitionSpec()),
    )


def test_products_in_a_loop_count_as_often_as_it_turns(scanned):
    traced, module = scanned
    by_hand = TURNS * 2 * PRODUCT  # forward, and the gradient of the weights
    assert module.flops() == by_hand
    assert jaxpr.work(traced.jaxpr).flops == by_hand * CHIPS


def test_each_collective_is_found_once_with_its_axes_bytes_and_runs(scanned, mesh, on):
    _, module = scanned
    found = collectives.collectives(module, mesh, on)
    square, rows = WIDTH * WIDTH * 4, ROWS * WIDTH * 2
    listed = {(c.kind, c.axes, c.times_per_step, c.in_loop): c.bytes for c in found}
    assert len(listed) == len(found) == 4
    assert listed["all-reduce", ("data", "fsdp"), 1, False] == square
    assert listed["reduce-scatter", ("fsdp",), 1, False] == square
    # Cast before it travels, whichever way the compiler turns the two round.
    assert listed["all-gather", ("fsdp",), 1, False] in (square, square // 2)
    assert listed["all-reduce", ("data",), TURNS, True] in (rows, 2 * rows)
    assert collectives.large_in_loops(found) == []
    assert [c.times_per_step for c in collectives.large_in_loops(found, rows)] == [TURNS]
    assert len(collectives.large_at_top(found, collectives.REDUCTIONS, square)) == 2


def test_collective_time_is_bytes_over_the_links_the_group_spans(scanned, mesh, on):
    _, module = scanned
    everywhere = [
        c for c in collectives.collectives(module, mesh, on) if c.axes == ("data", "fsdp")
    ]
    # 3/4 of the array goes round twice, over one link along each of two open axes.
    seconds = 2 * WIDTH * WIDTH * 4 * 3 / 4 / (2 * 45e9)
    assert [c.seconds for c in everywhere] == pytest.approx([seconds])


def test_a_weight_gradient_summed_in_float32_is_the_loops_one_accumulator(scanned):
    _, module = scanned
    [(times, array)] = module.loop_accumulators({(WIDTH, WIDTH)})
    assert (times, array.dtype) == (TURNS, "f32")
    assert module.narrowings_in_loops({(WIDTH, WIDTH)}) == []


def test_cycles_and_bytes_grow_with_the_turns(scanned):
    _, module = scanned
    outside = module.cycles(outside_loops=True)
    assert 0 < module.cycles("optimizer", outside_loops=True) < outside < module.cycles()
    # Each chip at least reads what it is given and writes what it returns.
    assert module.hbm_bytes() > (2 * WIDTH * WIDTH + WIDTH * WIDTH // 2) * 4


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bhqk,bhkd->bhqd", (2, 3, 64, 32), (2, 3, 32, 16)),
        ("bqhd,bkhd->bhqk", (2, 64, 3, 32), (2, 48, 3, 32)),
        ("bld,blf->df", (2, 64, 48), (2, 64, 40)),
    ],
)
def test_batched_products_count_alike_in_the_trace_and_in_the_program(on, equation, left, right):
    mesh = Mesh(np.asarray(on.devices[:1]), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    traced, module = compiled(
        jax.jit(lambda a, b: jnp.tanh(jnp.einsum(equation, jnp.sin(a), b))),
        *(
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everywhere)
            for shape in (left, right)
        ),
    )
    sizes = {}
    for term, shape in zip(equation.split("->")[0].split(","), (left, right), strict=True):
        sizes |= dict(zip(term, shape, strict=True))
    by_hand = 2 * int(np.prod(list(sizes.values())))
    assert module.flops() == jaxpr.work(traced.jaxpr).flops == by_hand


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh[a=2,b=4] {a}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'a'}", [[3, 1], [2, 0]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
    ],
)
def test_groups_read_in_every_way_of_writing_them(text, groups):
    assert collectives.replica_groups(text, 8) == groups


def test_groups_in_no_known_way_are_refused_not_guessed():
    with pytest.raises(hlo.UnreadableError, match="not understood"):
        collectives.replica_groups("replica_groups=<new>", 8)


LOOP = """HloModule m

%condition (p: (s32[], f32[4,4])) -> pred[] {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %kernel = f32[4,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={
}
  %half = f32[4,4]{1,0} convert(%kernel)
  %narrow = bf16[4,4]{1,0} convert(%half)
  %y = f32[4,4]{1,0} dot(%x, %narrow), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[4,4]{1,0}) tuple(%i, %y)
}

ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,4]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[4,4]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %x = f32[4,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_kernels_lines_of_braces_do_not_end_a_computation():
    module = hlo.Module(LOOP.replace("LIMIT", "7"))
    assert module.flops() == 7 * 2 * 4 * 4 * 4
    assert module.narrowings_in_loops({(4, 4)}) == ["narrow"]


GATHER = (
    "bf16[8,4]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}, "
    'backend_config={"async_collective_fusion_config":{"flag_start":"FLAG","flag_end":"FLAG"}}'
)


def overlapped(flag_while_it_runs, flag_at_its_end):
    """A gather as libtpu prints it: where it starts, beside a product, and where it is awaited."""
    fused = []
    for place, flag, call in (
        ("start", "-1", "AsyncCollectiveStart"),
        ("beside", flag_while_it_runs, "Other"),
        ("done", flag_at_its_end, "AsyncCollectiveDone"),
    ):
        fused.append(
            f"%{place} (p: bf16[4,4]) -> bf16[8,4] {{\n"
            "  %p = bf16[4,4]{1,0} parameter(0)\n"
            f"  %g = {GATHER.replace('FLAG', flag)}\n"
            f'  ROOT %r = bf16[8,4]{{1,0}} custom-call(%g), custom_call_target="{call}"\n}}\n'
        )
    entry = "ENTRY %main (a: bf16[4,4]) -> bf16[8,4] {\n  %a = bf16[4,4]{1,0} parameter(0)\n"
    for place in ("start", "beside", "done"):
        entry += f"  %{place}.1 = bf16[8,4]{{1,0}} fusion(%a), kind=kCustom, calls=%{place}\n"
    return hlo.Module("\n".join([*fused, entry + "}"]))


@pytest.mark.parametrize("flags", [("2", "8"), ("2", "-1")])
def test_an_overlapped_collective_counts_where_it_starts(mesh, on, flags):
    [gather] = collectives.collectives(overlapped(*flags), mesh, on)
    assert (gather.kind, gather.axes, gather.bytes) == ("all-gather", ("fsdp",), 64)


def test_a_loop_that_does_not_tell_its_turns_is_refused():
    with pytest.raises(hlo.UnreadableError, match="turns of loop loop"):
        hlo.Module(LOOP.replace("constant(LIMIT)", "add(%i, %i)"))


def test_kernels_count_their_body_for_each_turn_of_the_grid():
    from jax.experimental import pallas as pl

    def body(x_ref, y_ref, out_ref):
        out_ref[...] = x_ref[...] @ y_ref[...]

    def function(x, y):
        return pl.pallas_call(
            body,
            grid=(3,),
            in_specs=[
                pl.BlockSpec((8, 64), lambda i: (i, 0)),
                pl.BlockSpec((64, 128), lambda i: (0, 0)),
            ],
            out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((24, 128), jnp.float32),
        )(x, y)

    work = jaxpr.work(jax.make_jaxpr(function)(jnp.zeros((24, 64)), jnp.zeros((64, 128))))
    [kernel] = work.kernels
    assert work.flops == work.kernel_flops == kernel.flops == 3 * 2 * 8 * 64 * 128
    assert kernel.mxu_flops == 2 * kernel.flops  # 64 rows of a matrix unit of 128
    assert kernel.bytes == 3 * 4 * (8 * 64 + 64 * 128 + 8 * 128)
    assert (kernel.calls, kernel.turns) == (1, 3)


def test_quiet_libtpu_leaves_the_users_own_values(monkeypatch):
    monkeypatch.setenv("TPU_MIN_LOG_LEVEL", "0")
    topology.quiet_libtpu()
    assert os.environ["TPU_MIN_LOG_LEVEL"] == "0"
