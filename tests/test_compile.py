"""The compile command, end to end with the real TPU compiler, on a model that takes seconds."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import pytest

from albert_jax import compile as compile_command
from albert_jax.compiling import analysis, report, topology
from albert_jax.errors import UserError
from albert_jax.training import fitting

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = f"--config={ROOT / 'configs' / 'tiny.py'}"
SMALL = (
    TINY,
    "--config.model.vocab_size=1000",
    "--config.model.dtype=bfloat16",
)

needs_libtpu = pytest.mark.skipif(
    not topology.libtpu_installed(), reason="needs the TPU compiler (libtpu)"
)


@dataclasses.dataclass
class Outcome:
    figures: dict
    text: str
    fitted: object
    on: topology.Slice
    kept: list[str]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One run of the command on four chips, everything asked for."""
    folder = tmp_path_factory.mktemp("compile")
    seen, original = [], analysis.analyse

    def look(fitted, on, text):
        seen.append((fitted, on))
        return original(fitted, on, text)

    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr(analysis, "analyse", look)
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
        code = compile_command.main(
            [
                *(*SMALL, "--topology=v5e:2x2", f"--json={folder / 'c.json'}"),
                *("--price_per_chip_hour=2.5", "--watts_per_chip=200", f"--save={folder / 'kept'}"),
            ]
        )
    assert code == 0
    figures = json.loads((folder / "c.json").read_text())
    kept = sorted(path.name for path in (folder / "kept").iterdir())
    return Outcome(figures, "\n".join(printed), *seen[0], kept)


@needs_libtpu
def test_the_figures_are_all_there_and_agree_with_each_other(outcome):
    c = outcome.figures
    assert (c["chips"], c["hbm_bytes_per_chip"]) == (4, int(15.75 * 2**30))
    memory = c["memory"]
    assert c["memory_bytes_per_chip"] == sum(
        sign * memory[kind]
        for kind, sign in {
            **dict.fromkeys(("arguments", "outputs", "temporaries", "code"), 1),
            "aliased": -1,
        }.items()
    )
    # LAMB or Adam: parameters and two moments, in parts of a fourth but for small vectors.
    assert 3 * c["parameter_bytes_per_chip"] <= c["state_bytes_per_chip"]
    assert c["state_bytes_per_chip"] < 0.5 * 3 * 4 * c["parameters"]
    assert c["hlo_flops"] == pytest.approx(c["program_flops"], rel=0.01)
    assert 1.0 <= c["program_flops"] / c["model_flops"] < 1.1
    parts = c["modelled_seconds"]
    step = sum(parts[part] for part in ("compute", "collectives", "network", "kernels"))
    assert c["modelled_step_seconds"] == pytest.approx(step)
    assert c["modelled_model_flops_utilization"] == pytest.approx(
        c["model_flops"] / (step * 4 * 197e12)
    )
    assert 0 < c["compile_seconds"] < 600


@needs_libtpu
def test_every_collective_says_what_where_how_much_and_how_often(outcome):
    collectives = outcome.figures["collectives"]
    assert {"all-gather", "reduce-scatter"} <= {c["kind"] for c in collectives}
    for collective in collectives:
        assert collective["axes"] == ["data"]
        assert collective["bytes"] > 0
        assert (collective["times_per_step"], collective["in_loop"]) == (1, False)


@needs_libtpu
def test_the_report_prices_the_whole_run(outcome):
    step = outcome.figures["modelled_step_seconds"]
    chip_hours = 2600 * step * 4 / 3600
    shown = re.search(r"([\d.,]+) chip-hours\n +([\d.,]+) at 2.5 a chip-hour", outcome.text)
    assert shown, outcome.text
    assert float(shown[1].replace(",", "")) == pytest.approx(chip_hours, abs=0.5)
    assert float(shown[2].replace(",", "")) == pytest.approx(2.5 * chip_hours, abs=0.5)
    assert "kWh at 200 W a chip" in outcome.text
    assert "never measured" in outcome.text


@needs_libtpu
def test_save_keeps_the_step_and_what_it_was_made_for(outcome):
    program, manifest = sorted(outcome.kept)
    assert re.fullmatch(r"jit_train_step-[0-9a-f]{64}-cache", program)
    assert manifest == "made_for.json"


@needs_libtpu
def test_without_text_what_needs_none_is_still_reported(outcome):
    class Untold:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nmore")

    fitted = dataclasses.replace(outcome.fitted, compiled=Untold())
    found = analysis.analyse(fitted, outcome.on)
    figures = report.as_json(found)
    told = ("memory_bytes_per_chip", "model_flops", "program_flops", "parameters")
    assert [figures[key] for key in told] == [outcome.figures[key] for key in told]
    assert figures["collectives"] is figures["modelled_step_seconds"] is None
    assert "no text to count collectives and cycles in: INTERNAL: RET_CHECK" in report.text(found)


@needs_libtpu
def test_what_does_not_fit_is_told_with_its_size_then_smaller_settings_are_tried(tmp_path, capfd):
    argv = [*SMALL, "--topology=v5e:2x2", f"--json={tmp_path / 'c.json'}"]
    argv += [f"--config.model.{field}" for field in ("hidden_size=32768", "remat=full")]
    argv += ["--config.model.intermediate_size=131072", "--config.train.global_batch_size=8"]
    assert compile_command.main(argv) == 1
    error = capfd.readouterr().err
    shown = re.search(r"a chip needs ([\d.]+) GiB and has 15.75; ([\d.]+) GiB too much", error)
    assert shown, error
    assert float(shown[1]) - 15.75 == pytest.approx(float(shown[2]), abs=0.011)
    # 13 billion parameters and their moments, a fourth of each on a chip.
    assert float(shown[1]) > 3 * 4 * (4 * 32768**2 + 2 * 32768 * 131072) / 4 / 2**30
    assert "none; split the model with mesh.tensor" in error
    figures = json.loads((tmp_path / "c.json").read_text())
    assert not figures["fits"]
    assert figures["memory_bytes_per_chip"] > figures["hbm_bytes_per_chip"]
    assert figures["modelled_step_seconds"] is None


@needs_libtpu
def test_a_sweep_lists_the_fastest_first_and_what_failed_last(outcome):
    found = analysis.analyse(outcome.fitted, outcome.on)
    slower = dataclasses.replace(
        found, estimate=dataclasses.replace(found.estimate, compute=found.estimate.compute + 7)
    )
    config = found.config
    listed = report.sweep(
        [
            (config, fitting.DoesNotFitError(20 * 2**30, 16 * 2**30)),
            (config, slower),
            (config, UserError("no such kernel")),
            (config, found),
        ]
    )
    header, *rows = listed.splitlines()
    assert header.split()[:3] == ["microbatch", "remat", "attention"]
    assert float(rows[1].split()[5]) - float(rows[0].split()[5]) == pytest.approx(7, abs=1e-3)
    assert {rows[2].split()[-1], rows[3].split()[-1]} == {"fit", "kernel"}
    assert "20.00" in rows[3] or "20.00" in rows[2]


@needs_libtpu
def test_the_list_shows_chips_hosts_memory_and_peak(capsys):
    assert compile_command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"v5e:16x16 +256 +64 +15.75 +197", listed)
    assert re.search(r"v4:8x8x8 +512 +128 +30.75 +275 +two cores", listed)
    assert re.search(r"v5p:8x8x8 +512 +128 +95.73 +459", listed)
    assert re.search(r"v6e:16x16 +256 +64 +31.24 +918", listed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TINY, "--topology=v5e:2x2"], "model.vocab_size=0 .* --config.model.vocab_size=30000"),
        ([*SMALL, "--topology=v9:2x2"], "no chip 'v9'; there are v5e, v6e, v4, v5p"),
        ([*SMALL, "--topology=v5e:2x2x2"], "v5e slices have 2 extents, for example v5e:16x16"),
        ([*SMALL, "--topology=v5e:32x32"], "1,024 chips; the largest v5e slice has 256"),
        ([*SMALL, "--topology=v5e:2x2", "--slices=0"], "--slices=0 is no number of slices"),
    ],
)
def test_mistakes_are_told_with_what_to_do(arguments, message):
    with pytest.raises(UserError, match=message):
        compile_command.main(arguments)


@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:3x3"], "the compiler knows no such slice"),
        (["--topology=v5e:2x2", "--config.mesh.data=3"], "does not make 4 devices"),
        (["--topology=v5e:4x8", "--config.train.global_batch_size=48"], "does not split over"),
    ],
)
def test_slices_and_meshes_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        compile_command.main([*SMALL, *arguments])


def test_a_slice_needs_naming(capsys):
    with pytest.raises(SystemExit) as stop:
        compile_command.main([TINY])
    assert stop.value.code == 2
    assert "--config and --topology are needed" in capsys.readouterr().err


@needs_libtpu
def test_rings_close_only_where_the_slice_runs_round():
    def closed(name):
        on = topology.get(name)
        return [on.wraps(axis) for axis in range(len(on.extents))]

    assert closed("v5e:8x16") == [False, True]
    assert closed("v6e:8x8") == [False, False]
    assert closed("v4:4x4x8") == [True, True, True]
    assert closed("v5p:2x4x4") == [False, False, False]
    assert math.prod(topology.get("v5e:2x2", slices=2).extents) == 4
