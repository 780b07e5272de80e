"""One writer of a folder at a time, on this machine and on others that share its disk.

Another machine is played by what it would write into the lock's file: the flock of this system is
not in its way, as on a shared disk that does not keep it between machines.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from albert_jax.data import lease
from albert_jax.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECS", 0.05)
    monkeypatch.setattr(lease, "STALE_SECS", 1.0)


@contextlib.contextmanager
def held_by_another_process(folder):
    script = (
        "import pathlib, sys; from albert_jax.data import lease\n"
        "with lease.held(pathlib.Path(sys.argv[1])): print('taken', flush=True); input()\n"
    )
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"taken\n"
        yield process
        with contextlib.suppress(BrokenPipeError):
            process.communicate(b"\n", timeout=30)


def write_as_elsewhere(folder, beat: float, name: str = "far") -> None:
    content = {"id": name, "machine": f"{name} 1", "host": name, "process": 7, "since": "noon"}
    (folder / lease.LOCK).write_text(json.dumps({**content, "beat": beat}))


def test_a_second_process_is_refused_and_told_who_has_it(tmp_path):
    with held_by_another_process(tmp_path) as process:
        who = f"process {process.pid} of "
        assert lease.holder(tmp_path).startswith(who)
        with (
            pytest.raises(UserError, match=f"another albert_jax.prepare .*{who}"),
            lease.held(tmp_path),
        ):
            pass
    assert lease.holder(tmp_path) == ""
    with lease.held(tmp_path) as check:
        check()


def test_the_folder_of_a_killed_process_is_free_at_once(tmp_path, monkeypatch):
    with held_by_another_process(tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert lease.holder(tmp_path) == ""
        monkeypatch.setattr(lease, "STALE_SECS", 1e9)
        with lease.held(tmp_path):
            pass


def test_what_a_machine_elsewhere_keeps_writing_is_its_own(tmp_path):
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            write_as_elsewhere(tmp_path, time.monotonic())

    write_as_elsewhere(tmp_path, 0)
    writer = threading.Thread(target=beat)
    writer.start()
    try:
        assert lease.holder(tmp_path) == "process 7 of far, since noon"
        with pytest.raises(UserError, match="process 7 of far"), lease.held(tmp_path):
            pass
    finally:
        over.set()
        writer.join()


def test_what_a_machine_elsewhere_has_left_is_taken_over_after_a_while(tmp_path, capsys):
    write_as_elsewhere(tmp_path, 0)
    began = time.monotonic()
    with lease.held(tmp_path) as check:
        assert time.monotonic() - began >= lease.STALE_SECS
        assert "waits 1 s to see whether that is still at work" in capsys.readouterr().err
        check()
    long_ago = time.time() - 60
    write_as_elsewhere(tmp_path, 0)
    os.utime(tmp_path / lease.LOCK, (long_ago, long_ago))
    assert lease.holder(tmp_path) == ""


def test_one_that_was_taken_for_dead_finds_out_and_leaves_the_other_alone(tmp_path):
    with lease.held(tmp_path) as check:
        check()
        write_as_elsewhere(tmp_path, 0)
        time.sleep(5 * lease.BEAT_SECS)
        with pytest.raises(UserError, match="process 7 of far"):
            check()
    assert json.loads((tmp_path / lease.LOCK).read_text())["host"] == "far"


def test_of_two_machines_that_take_over_at_the_same_time_one_gets_it(tmp_path):
    """The second is a process of its own, that sees another machine in ours."""
    write_as_elsewhere(tmp_path, 0, "dead")
    script = (
        "import pathlib, sys\n"
        "from albert_jax.data import lease\n"
        "lease.STALE_SECS, lease.BEAT_SECS = 1.0, 0.05\n"
        "lease._machine = lambda: sys.argv[2]\n"
        "lease.fcntl.flock = lambda *_: None\n"
        "import time\n"
        "print('ready', flush=True); input()\n"
        "with lease.held(pathlib.Path(sys.argv[1])) as check:\n"
        "    time.sleep(2); check(); print('had it')\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in both:
        process.stdout.readline()
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=60) for process in both]
    assert sorted("had it" in out for out, _ in ends) == [False, True], ends
