"""Processes that train together, each with its log, started again where gloo aborts one of them."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import time
from collections.abc import Callable, Sequence


@dataclasses.dataclass
class Run:
    """The processes of one command, and the folder of their logs."""

    folder: pathlib.Path
    processes: list[subprocess.Popen]

    def wait(self, seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]

    def done(self) -> bool:
        return all(process.poll() == 0 for process in self.processes)

    def log(self, index: int) -> str:
        return (self.folder / f"{index}.log").read_text()

    def logs(self) -> str:
        return "\n".join(f"-- {i}\n{self.log(i)}" for i in range(len(self.processes)))


def start(
    folder: pathlib.Path,
    commands: Sequence[Sequence[str]],
    environment: dict[str, str] | None = None,
) -> Run:
    """A process for each command, in the folder, and told of the others if there are any."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run = Run(folder, [])
    for index, command in enumerate(commands):
        together = (
            f"--coordinator_address=localhost:{port}",
            f"--num_processes={len(commands)}",
            f"--process_id={index}",
        )
        with (folder / f"{index}.log").open("w") as log:
            process = subprocess.Popen(
                [*command, *(together if len(commands) > 1 else ())],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )
        run.processes.append(process)
    return run


def start_until(
    there: Callable[[Run], bool],
    folder: pathlib.Path,
    commands: Sequence[Sequence[str]],
    environment: dict[str, str] | None = None,
) -> Run:
    """As `start`, and waits; each attempt has a folder of its own.

    Gloo, by which CPUs reduce, ends a process now and then by an exception of its own (seen:
    std::system_error, on a crowded machine). Then this does what the message asks for: all are
    started again, twice at most.
    """
    attempt = 0
    while True:
        run = start(folder.with_name(f"{folder.name}_{attempt}"), commands, environment)
        if _waited(run, there):
            return run
        assert "was aborted by a library" in run.logs(), run.logs()
        assert attempt < 2, run.logs()
        attempt += 1


def _waited(run: Run, there: Callable[[Run], bool]) -> bool:
    """Waits for it; False where all processes ended before."""
    deadline = time.monotonic() + 400
    while True:
        ended = None not in [process.poll() for process in run.processes]
        if there(run):
            return True
        if ended:
            return False
        assert time.monotonic() < deadline, run.logs()
        time.sleep(0.05)
