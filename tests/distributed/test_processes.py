"""Real processes: one run on any number of them, stopped, killed, and gone on with on another."""

import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable

import pytest
import small_store
import together

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BATCH, STEPS = 32, 30
# Compiled in half the time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
CONFIG = (
    f"--config={ROOT / 'configs' / 'tiny.py'}",
    f"--config.train.steps={STEPS}",
    f"--config.train.global_batch_size={BATCH}",
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=48",
    "--config.model.hidden_dropout_prob=0",
    "--config.model.attention_probs_dropout_prob=0",
    "--config.train.stall_minutes=3",
    "--config.data.max_seq_length=16",
    "--config.data.max_predictions_per_seq=3",
    "--config.optimizer.warmup_steps=5",
    "--config.log.every_steps=1",
    "--config.eval.every_steps=0",
    "--config.checkpoint.every_steps=4",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_store.make(tmp_path_factory.mktemp("store"))


def program(devices: int) -> dict[str, str]:
    return {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        # Process 0 alone would fill it and be helped by it, and wait for the others.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def commands(
    stores: list[pathlib.Path], workdir: pathlib.Path, *meshes: tuple[int, int, int]
) -> list[list[str]]:
    """A command for each store, which also lists the examples that it makes where it runs.

    Each is given its own one of the meshes; all the only one.
    """
    every = []
    for index, store in enumerate(stores):
        mesh = zip(("data", "fsdp", "tensor"), meshes[index % len(meshes)], strict=True)
        every.append(
            [
                sys.executable,
                str(pathlib.Path(__file__).with_name("recording_train.py")),
                f"{index}.examples",
                *CONFIG,
                f"--config.data.path={store}",
                f"--workdir={workdir}",
                *(f"--config.mesh.{axis}={size}" for axis, size in mesh),
            ]
        )
    return every


def examples(run: together.Run, index: int) -> list[tuple[int, int, int]]:
    lines = (run.folder / f"{index}.examples").read_text().splitlines()
    return sorted(tuple(json.loads(line)) for line in lines)


def train_rows(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().split("\n")[:-1]]
    return [row for row in map(json.loads, lines) if "split" not in row]


def after(workdir: pathlib.Path, step: int) -> Callable[[together.Run], bool]:
    return lambda _: any(row["step"] >= step for row in train_rows(workdir))


def test_one_run_on_one_two_and_four_processes(store, tmp_path):
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    one = commands([store], reference, (1, 1, 1))
    alone = together.start(tmp_path / "alone", one, program(1))

    # Two processes; a signal to the second stops both, saved at one step.
    mesh = commands([store] * 2, workdir, (2, 4, 1))
    two = together.start_until(after(workdir, 3), tmp_path / "two", mesh, program(4))
    two.processes[1].send_signal(signal.SIGTERM)
    assert two.wait(60) == [1, 1], two.logs()
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"SIGTERM to process 1: saved step {saved} of {STEPS}" in two.log(0)
    assert train_rows(workdir)[-1]["step"] == saved < STEPS
    assert two.log(1) == ""
    assert alone.wait(400) == [0], alone.logs()

    # Four go on; one is killed, and the others say so and leave.
    mesh = commands([store] * 4, workdir, (2, 2, 2))
    four = together.start_until(after(workdir, saved + 2), tmp_path / "four", mesh, program(2))
    four.processes[2].kill()
    killed = time.monotonic()
    assert four.wait(60) == [1, 1, -signal.SIGKILL, 1], four.logs()
    print(f"the others left {time.monotonic() - killed:.1f} s after the kill")
    for index in (0, 1, 3):
        assert "process 2 of 4 died (no heartbeat for 20 s); the last checkpoint" in four.log(index)
        assert "Traceback" not in four.log(index)

    # Two more end the run.
    mesh = commands([store] * 2, workdir, (8, 1, 1))
    last = together.start_until(together.Run.done, tmp_path / "last", mesh, program(4))

    ours, theirs = train_rows(workdir), train_rows(reference)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)

    # Each built its own share of the rows of each batch, and nothing else.
    for run in (two, four, last):
        count = len(run.processes)
        share = BATCH // count
        for index in range(count):
            for first, final, size in examples(run, index):
                assert size == share == final - first + 1
                assert first % BATCH == index * share


def test_what_is_wrong_on_one_host_ends_all_and_is_named(store, tmp_path):
    missing = tmp_path / "not_mounted_here"
    both = commands([store, missing], tmp_path / "run", (2, 1, 1))
    run = together.start(tmp_path / "logs", both, program(1))
    assert run.wait(60) == [1, 1], run.logs()
    assert f"error: no token store {missing}" in run.log(1)
    assert f"process 1 of 2 stopped: no token store {missing}" in run.log(0)
    assert "Traceback" not in run.logs()


def test_processes_on_two_meshes_are_refused(store, tmp_path):
    both = commands([store] * 2, tmp_path / "run", (4, 1, 1), (2, 2, 1))
    run = together.start(tmp_path / "logs", both, program(2))
    assert run.wait(60) == [1, 1], run.logs()
    assert "process 1 was given another config or store than process 0" in run.log(1)
    assert "mesh.data: 4 there, 2 now\n  mesh.fsdp: 1 there, 2 now" in run.log(1)
    assert "Traceback" not in run.logs()


def test_the_leaders_death_ends_the_others(store, tmp_path):
    both = commands([store] * 2, tmp_path / "run", (2, 1, 1))
    run = together.start(tmp_path / "logs", both, program(1))
    deadline = time.monotonic() + 60
    while "batch:" not in run.log(0):
        assert time.monotonic() < deadline, run.logs()
        time.sleep(0.05)
    run.processes[0].kill()
    assert run.wait(60) == [-signal.SIGKILL, 1], run.logs()
    assert "process 0 of 2, the coordinator, died" in run.log(1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "belong together"),
        (["--coordinator_address=a", "--num_processes=2", "--process_id=0"], "is not HOST:PORT"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], "from 0 to 1"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(tmp_path, flags, message):
    done = small_store.run_here("train", *CONFIG, f"--workdir={tmp_path}", *flags, expect=1)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
