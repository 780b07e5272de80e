"""Real processes: one run on any number of them, stopped, killed, and gone on with on another."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import small_store

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


@dataclasses.dataclass
class Run:
    """The processes of one command, each with its log and its list of examples."""

    folder: pathlib.Path
    processes: list[subprocess.Popen]

    def wait(self, seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        codes = [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
        return codes

    def log(self, index: int) -> str:
        return (self.folder / f"{index}.log").read_text()

    def logs(self) -> str:
        return "\n".join(f"-- {i}\n{self.log(i)}" for i in range(len(self.processes)))

    def examples(self, index: int) -> list[tuple[int, int, int]]:
        lines = (self.folder / f"{index}.examples").read_text().splitlines()
        return sorted(tuple(json.loads(line)) for line in lines)


def start(
    folder: pathlib.Path,
    stores: list[pathlib.Path],
    workdir: pathlib.Path,
    devices: int,
    *meshes: tuple[int, int, int],
) -> Run:
    """As many processes as there are stores, with so many devices each.

    Each is given its own one of the meshes; all the only one.
    """
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run = Run(folder, [])
    for index, store in enumerate(stores):
        mesh = zip(("data", "fsdp", "tensor"), meshes[index % len(meshes)], strict=True)
        together = (
            f"--coordinator_address=localhost:{port}",
            f"--num_processes={len(stores)}",
            f"--process_id={index}",
        )
        with (folder / f"{index}.log").open("w") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    str(pathlib.Path(__file__).with_name("recording_train.py")),
                    str(folder / f"{index}.examples"),
                    *CONFIG,
                    f"--config.data.path={store}",
                    f"--workdir={workdir}",
                    *(f"--config.mesh.{axis}={size}" for axis, size in mesh),
                    *(together if len(stores) > 1 else ()),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
                    # Process 0 alone would fill it and be helped by it, and wait for the others.
                    "JAX_ENABLE_COMPILATION_CACHE": "false",
                },
            )
        run.processes.append(process)
    return run


def train_rows(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().split("\n")[:-1]]
    return [row for row in map(json.loads, lines) if "split" not in row]


def wait_for_step(run: Run, workdir: pathlib.Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not any(row["step"] >= step for row in train_rows(workdir)):
        assert time.monotonic() < deadline, run.logs()
        assert all(process.poll() is None for process in run.processes), run.logs()
        time.sleep(0.05)


def test_one_run_on_one_two_and_four_processes(store, tmp_path):
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    alone = start(tmp_path / "alone", [store], reference, 1, (1, 1, 1))

    # Two processes; a signal to the second stops both, saved at one step.
    two = start(tmp_path / "two", [store] * 2, workdir, 4, (2, 4, 1))
    wait_for_step(two, workdir, 3)
    two.processes[1].send_signal(signal.SIGTERM)
    assert two.wait(60) == [1, 1], two.logs()
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"SIGTERM to process 1: saved step {saved} of {STEPS}" in two.log(0)
    assert train_rows(workdir)[-1]["step"] == saved < STEPS
    assert two.log(1) == ""
    assert alone.wait(400) == [0], alone.logs()

    # Four go on; one is killed, and the others say so and leave.
    four = start(tmp_path / "four", [store] * 4, workdir, 2, (2, 2, 2))
    wait_for_step(four, workdir, saved + 2)
    four.processes[2].kill()
    killed = time.monotonic()
    assert four.wait(60) == [1, 1, -signal.SIGKILL, 1], four.logs()
    print(f"the others left {time.monotonic() - killed:.1f} s after the kill")
    for index in (0, 1, 3):
        assert "process 2 of 4 died (no heartbeat for 20 s); the last checkpoint" in four.log(index)
        assert "Traceback" not in four.log(index)

    # Two more end the run.
    last = start(tmp_path / "last", [store] * 2, workdir, 4, (8, 1, 1))
    assert last.wait(400) == [0, 0], last.logs()

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
            for first, final, size in run.examples(index):
                assert size == share == final - first + 1
                assert first % BATCH == index * share


def test_what_is_wrong_on_one_host_ends_all_and_is_named(store, tmp_path):
    missing = tmp_path / "not_mounted_here"
    run = start(tmp_path / "logs", [store, missing], tmp_path / "run", 1, (2, 1, 1))
    assert run.wait(60) == [1, 1], run.logs()
    assert f"error: no token store {missing}" in run.log(1)
    assert f"process 1 of 2 stopped: no token store {missing}" in run.log(0)
    assert "Traceback" not in run.logs()


def test_processes_on_two_meshes_are_refused(store, tmp_path):
    run = start(tmp_path / "logs", [store] * 2, tmp_path / "run", 2, (4, 1, 1), (2, 2, 1))
    assert run.wait(60) == [1, 1], run.logs()
    assert "process 1 was given another config or store than process 0" in run.log(1)
    assert "mesh.data: 4 there, 2 now\n  mesh.fsdp: 1 there, 2 now" in run.log(1)
    assert "Traceback" not in run.logs()


def test_the_leaders_death_ends_the_others(store, tmp_path):
    run = start(tmp_path / "logs", [store] * 2, tmp_path / "run", 1, (2, 1, 1))
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
