"""What the TPU compiler makes of the training step: where its collectives are, what it keeps, what
it computes twice.

The figures of xxlarge are for 256 chips; other meshes are proven on a smaller model whose weights
are still megabytes each.
"""

import dataclasses
import math

import pytest

from albert_jax import config as config_lib
from albert_jax.compiling import analysis, collectives, hlo, topology
from albert_jax.compiling.collectives import LARGE, REDUCTIONS
from albert_jax.training import fitting, sharding
from albert_jax.training.compiler_options import compiler_options

pytestmark = pytest.mark.skipif(
    not topology.libtpu_installed(), reason="needs libtpu, the TPU compiler"
)
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Compiled:
    found: analysis.Analysis
    module: hlo.Module

    @property
    def in_loops(self) -> list[collectives.Collective]:
        assert self.found.collectives is not None
        return collectives.large_in_loops(self.found.collectives)

    def at_top(self, *kinds: str) -> list[collectives.Collective]:
        assert self.found.collectives is not None
        return collectives.large_at_top(self.found.collectives, kinds)


def compiled(cfg: config_lib.Config, name: str, slices: int = 1) -> Compiled:
    on = topology.get(name, slices)
    mesh = sharding.make_mesh(cfg, on.devices)
    options = compiler_options(on.devices[0].device_kind)
    fitted = fitting.compile_step(cfg, mesh, on.chip.hbm_bytes, options)
    return Compiled(analysis.analyse(fitted, on), hlo.Module(fitted.compiled.as_text() or ""))


@pytest.fixture(scope="module")
def xxlarge() -> Compiled:
    return compiled(config_lib.load("configs/xxlarge.py"), "v5e:16x16")


def smaller(batch: int, microbatch_size: int, **mesh: int) -> config_lib.Config:
    """Three layers of 1024: the feed-forward kernels have 8 MiB in bfloat16."""
    return config_lib.Config(
        model=config_lib.ModelConfig(
            vocab_size=8192,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=3,
            num_attention_heads=16,
            max_position_embeddings=128,
        ),
        data=config_lib.DataConfig(max_seq_length=128, max_predictions_per_seq=20),
        train=config_lib.TrainConfig(global_batch_size=batch, microbatch_size=microbatch_size),
        mesh=config_lib.MeshConfig(**mesh),
    )


def test_xxlarge_fits_256_chips_with_room(xxlarge: Compiled):
    memory = xxlarge.found.memory
    assert memory.total <= 7.5 * GIB
    assert memory.arguments <= 0.06 * GIB  # masters and moments lie in parts


def test_large_gradients_are_reduced_once_and_kernels_gathered_once(xxlarge: Compiled):
    assert xxlarge.in_loops == []
    reductions, gathers = xxlarge.at_top(*REDUCTIONS), xxlarge.at_top("all-gather")
    assert 6 <= len(reductions) <= 9
    assert sum(c.bytes * c.times_per_step for c in reductions) <= 0.84 * GIB
    assert sum(c.bytes * c.times_per_step for c in gathers) <= 0.42 * GIB
    assert {c.dtype for c in gathers} == {"bf16"}
    # (A gather of a megabyte or so may be written as the sum of disjoint parts.)
    assert {c.dtype for c in reductions if c.bytes >= 16 * LARGE} == {"f32"}


def test_little_is_computed_twice(xxlarge: Compiled):
    found = xxlarge.found
    assert found.program_flops <= 1.01 * found.model_flops
    assert found.hlo_flops == pytest.approx(found.program_flops, rel=0.01)


def test_gradients_are_summed_over_depth_in_float32(xxlarge: Compiled):
    shapes = [(4096, 16384), (16384, 4096), (4096, 4096)]
    sums = [array for times, array in xxlarge.module.loop_accumulators(shapes) if times == 24]
    assert [array.dtype for array in sums] == ["f32"] * 6
    assert xxlarge.module.narrowings_in_loops(shapes) == []


def test_the_update_takes_no_time_to_speak_of(xxlarge: Compiled):
    assert xxlarge.found.estimate is not None
    assert xxlarge.found.estimate.optimizer <= 2e-3


def test_the_program_does_not_grow_with_depth():
    on = topology.get("v5e:2x2")

    def lines(layers: int) -> int:
        cfg = smaller(8, 2)
        cfg = dataclasses.replace(
            cfg, model=dataclasses.replace(cfg.model, num_hidden_layers=layers)
        )
        run = fitting.program.build(cfg, sharding.make_mesh(cfg, on.devices))
        traced = run.train_step.trace(
            run.abstract_state, run.abstract_batch(), *run.abstract_frozen
        )
        return len(traced.lower(lowering_platforms=("tpu",)).as_text().splitlines())

    assert lines(48) == lines(12)


def test_accumulation_repeats_no_collective_on_a_mesh_of_two_axes():
    """Of `data` alone it is xxlarge's mesh."""
    step = compiled(smaller(32, 2, data=2, fsdp=2), "v5e:2x2")
    assert step.in_loops == []
    weights = [c for c in step.at_top(*REDUCTIONS) if c.bytes >= 4 * LARGE]
    # Six kernels of the layer, the word table and the pooler.
    assert sum(c.bytes for c in weights) <= 4 * (12 * 1024**2 + 8192 * 128 + 1024**2) * 1.02
    assert all(c.times_per_step == 1 for c in weights)


def test_only_parts_cross_between_slices():
    step = compiled(smaller(32, 2), "v5e:2x2", slices=2)
    assert step.in_loops == []
    assert step.found.collectives is not None
    crossing = [c for c in step.found.collectives if c.across_slices]
    largest_part = 4 * 1024 * 4096 // 4  # float32, a fourth on each of a slice's chips
    assert crossing
    assert max(c.bytes for c in crossing) <= largest_part
    assert all(not c.in_loop and set(c.axes) <= {"slice"} for c in crossing)


def test_tensor_parallelism_moves_activations_alone():
    cfg = smaller(32, 8, data=2, tensor=4)
    step = compiled(cfg, "v5e:2x4")
    # Two sums forward and two backward, for each layer and microbatch.
    assert step.found.collectives is not None
    inside = [c for c in step.found.collectives if c.in_loop and c.bytes > 1024]
    assert {c.axes for c in inside} == {("tensor",)}
    assert {c.bytes for c in inside} == {2 * 8 * 128 * 1024}
    assert sum(c.times_per_step for c in inside) == 4 * 3 * 2
    assert math.prod(step.found.mesh.values()) == 8
