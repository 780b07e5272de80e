"""launch/worker.sh, run for real with a stand-in for the training process; in the last test under
launch/tpu.sh, with a gcloud whose only worker is this machine.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAINING = """#!/usr/bin/env bash
trap 'sleep 0.3; echo saved; exit 1' TERM
echo "arguments: $*"
until [[ -e $HOME/exit_with ]]; do sleep 0.02; done
exit "$(<"$HOME/exit_with")"
"""

pytestmark = pytest.mark.skipif(
    shutil.which("setsid") is None or shutil.which("flock") is None,
    reason="TPU workers are Linux; setsid or flock is missing here",
)
THIS_MACHINE = """#!/usr/bin/env bash
case $4 in
  describe) echo ACTIVE,v5litepod-8,1, ;;
  scp) cp "$5" "$HOME/${6#*:}" ;;
  ssh) cd && bash -c "${7#--command=}" ;;
esac
"""
Worker = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A worker's home after setup; whatever was started there is ended."""
    package = tmp_path / "albert_jax"
    for name, text in {"launch/worker.sh": None, ".venv/bin/python": TRAINING}.items():
        path = package / name
        path.parent.mkdir(parents=True)
        path.write_text(text or (ROOT / name).read_text())
        path.chmod(0o755)
    yield tmp_path
    (tmp_path / "exit_with").write_text("0")


@pytest.fixture
def worker(home: pathlib.Path) -> Worker:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(home / "albert_jax/launch/worker.sh"), *arguments],
            env={"PATH": os.environ["PATH"], "HOME": str(home), **environment},
            text=True,
            capture_output=True,
            timeout=20,
        )

    return run


def status_when_ended(worker: Worker) -> str:
    for _ in range(200):
        status = worker("status").stdout
        if "running" not in status:
            return status
        time.sleep(0.02)
    pytest.fail("training goes on")


def test_a_run_from_start_to_its_exit_code(worker: Worker, home: pathlib.Path):
    assert "state=none" in worker("status").stdout
    workdir = home / "albert_jax" / "runs" / "a b"
    workdir.mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    assert worker("start", "id-1", "--config=x", "--workdir=runs/a b").returncode == 0
    status = worker("status").stdout.splitlines()
    assert status[0].startswith("worker=")
    assert status[0].endswith(" state=running")
    assert status[1] == 'metrics={"step": 2}'

    second = worker("start", "id-2", "--config=y")
    assert second.returncode == 1
    assert "training runs already" in second.stderr
    assert worker("start", "id-1", "--config=x").returncode == 0  # a retry of the same start
    assert worker("setup").returncode == 1  # not under a run's feet

    (home / "exit_with").write_text("3")
    assert "state=exited code=3" in status_when_ended(worker)
    logs = worker("logs").stdout
    assert "arguments: -u -m albert_jax.train --config=x --workdir=runs/a b" in logs
    assert logs.count("arguments") == 1
    assert "code=3" in logs

    (home / "exit_with").write_text("0")
    assert worker("start", "id-2", "--config=y").returncode == 0
    assert "state=exited code=0" in status_when_ended(worker)


def test_training_outlives_the_connection_that_started_it(worker: Worker, home: pathlib.Path):
    connection = subprocess.Popen(
        f"{home}/albert_jax/launch/worker.sh start id-1 --config=x && sleep 60",
        shell=True,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert connection.stdout is not None
    connection.stdout.readline()
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGKILL):
        os.killpg(connection.pid, number)
    connection.wait()
    assert "state=running" in worker("status").stdout


def test_stop_sends_sigterm_and_waits_for_the_save(worker: Worker):
    assert "state=none" in worker("stop", "5").stdout
    worker("start", "id-1", "--config=x")
    done = worker("stop", "5")
    assert done.returncode == 0
    assert "state=exited code=1" in done.stdout
    assert "saved" in worker("logs").stdout


def test_stop_says_when_the_save_takes_longer(worker: Worker, home: pathlib.Path):
    python = home / "albert_jax/.venv/bin/python"
    python.write_text(TRAINING.replace("sleep 0.3", "until [[ -e $HOME/exit_with ]]; do :; done"))
    worker("start", "id-1", "--config=x")
    done = worker("stop", "1")
    assert done.returncode == 1
    assert "still saving after 1 s" in done.stderr
    assert "state=running" in worker("status").stdout


def test_the_vms_own_sigterm_to_every_process_ends_in_a_save_with_its_code(worker: Worker, home):
    worker("start", "id-1", "--config=x")
    training = int((home / "albert_jax_run/pid").read_text())
    os.killpg(os.getpgid(training), signal.SIGTERM)  # the supervisor as well
    assert "state=exited code=1" in status_when_ended(worker)
    assert "saved" in worker("logs").stdout


def test_what_was_killed_with_its_supervisor_is_lost_and_can_be_started_again(worker: Worker, home):
    worker("start", "id-1", "--config=x")
    training = int((home / "albert_jax_run/pid").read_text())
    os.killpg(os.getpgid(training), signal.SIGKILL)
    assert "state=exited code=lost" in status_when_ended(worker)
    assert worker("start", "id-2", "--config=x").returncode == 0
    assert "state=running" in worker("status").stdout


def test_start_before_setup(worker: Worker, home: pathlib.Path):
    (home / "albert_jax/.venv/bin/python").unlink()
    done = worker("start", "id-1", "--config=x")
    assert done.returncode == 1
    assert "run setup first" in done.stderr


def test_the_bucket_is_mounted_at_setup_and_again_after_a_reboot(worker: Worker, home):
    programs = home / "bin"
    programs.mkdir()
    record = f'echo "${{0##*/}} $*" >>{home}/calls\n'
    fakes = {"python3": "", "sudo": "", "gcsfuse": "", "mountpoint": f"[[ -e {home}/mounted ]]"}
    for name, text in fakes.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{record}{text}")
        (programs / name).chmod(0o755)
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}

    done = worker("setup", "b-1", **path)
    assert done.returncode == 0, done.stderr
    calls = (home / "calls").read_text().splitlines()
    assert f"--editable {home}/albert_jax[tpu]" in next(c for c in calls if "uv pip install" in c)
    mount = next(call for call in calls if call.startswith("gcsfuse"))
    assert mount.endswith(" b-1 /bucket")
    assert {"--metadata-cache-ttl-secs=0", "--implicit-dirs"} <= set(mount.split())

    (home / "mounted").touch()
    (home / "calls").unlink()
    worker("start", "id-1", "--config=x", **path)
    assert "gcsfuse" not in (home / "calls").read_text()
    worker("stop", "5")

    (home / "mounted").unlink()
    (programs / "gcsfuse").write_text("#!/usr/bin/env bash\nexit 1\n")
    done = worker("start", "id-2", "--config=x", **path)
    assert done.returncode == 1
    assert "cannot mount gs://b-1" in done.stderr
    assert "state=exited code=1" in worker("status").stdout


def test_tpu_sh_and_worker_sh_together(home: pathlib.Path):
    shutil.rmtree(home / "albert_jax")
    programs = home / "bin"
    programs.mkdir()
    python = "$HOME/albert_jax/.venv/bin/python"
    install = f'mkdir -p "{python[:-7]}"; cp $HOME/training "{python}"'
    (home / "training").write_text(TRAINING)
    (home / "training").chmod(0o755)
    for name, text in {"gcloud": THIS_MACHINE, "python3": f"#!/bin/sh\n{install}\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def tpu(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        where = ("--name=a", "--zone=us-west4-a")
        return subprocess.run(
            ["bash", str(ROOT / "launch/tpu.sh"), command, *where, *arguments],
            env={"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(home)},
            text=True,
            capture_output=True,
            timeout=20,
        )

    train = ["--config=configs/tiny.py", "--workdir=runs/a b", "--config.x=$HOME;'q'\"\\"]
    assert "not set up" in tpu("run", "--", *train).stderr
    assert tpu("setup").returncode == 0
    done = tpu("run", "--", *train)
    assert done.returncode == 0, done.stderr
    assert "training: running" in tpu("status").stdout
    assert "runs on a already" in tpu("run", "--", *train).stderr
    assert tpu("stop", "--grace_seconds=5").returncode == 0
    assert "training: failed 1" in tpu("status").stdout
    logs = tpu("logs").stdout
    assert f"arguments: -u -m albert_jax.train {' '.join(train)}\n" in logs
    assert "saved" in logs
