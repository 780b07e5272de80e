"""Whose a folder is: one process at a time writes to it, on whatever machine.

In:  a folder, on this machine's disk or one that several machines share.
Out: `held`, a context in which it is ours; `holder`, who has it.

It takes two locks, since neither does alone. The system's own (flock) knows at once that a process
has died, but not every shared file system keeps it between machines. So the lock's file also says
who has it, and is written anew every `BEAT_SECS`: what a process of another machine wrote and has
left alone for `STALE_SECS` is nobody's. Until then one waits, by one's own clock: clocks differ.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from albert_jax.errors import UserError

LOCK = "lock"
BEAT_SECS = 10.0
STALE_SECS = 45.0

_CONTENT_BYTES = 512  # always as many, so that it is written at one go
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Callable[[], None]]:
    """Has the folder for this process.

    Yields:
        A function to call before what cannot be undone: UserError where another process, that took
        ours for dead, has the folder now.

    Raises:
        UserError: another process has it.
    """
    ours = {
        "id": uuid.uuid4().hex,
        "machine": _machine(),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        waited = _take(file, folder)
        _write(file, ours)
        over = threading.Event()

        def check() -> None:
            owner = _read(folder)
            if owner and owner.get("id") != ours["id"]:
                raise UserError(_busy(folder, owner))

        if waited:  # and so may have others: of all who wrote now, the last one has it
            time.sleep(STALE_SECS / 10)
            check()

        def beat() -> None:
            while not over.wait(BEAT_SECS):
                try:
                    check()
                    _write(file, ours)
                except UserError:
                    return  # whoever is about to do what cannot be undone finds it out
                except OSError:
                    continue  # a share that is away for now

        beating = threading.Thread(target=beat, name="lease", daemon=True)
        beating.start()
        try:
            yield check
        finally:
            over.set()
            beating.join()
            with contextlib.suppress(UserError, OSError):
                check()
                os.ftruncate(file, 0)
    finally:
        os.close(file)


def holder(folder: Path) -> str:
    """Who is writing to the folder, in words; "" if nobody is."""
    try:
        owner = _read(folder)
        age = time.time() - (folder / LOCK).stat().st_mtime
    except OSError:
        return ""
    if not owner:
        return ""
    alive = _lives(owner) if owner.get("machine") == _machine() else age < STALE_SECS
    return _who(owner) if alive else ""


def _take(file: int, folder: Path) -> bool:
    """Returns when nobody else has the folder; whether it had to wait for that."""
    locked = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(_busy(folder, _read(folder))) from None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        locked = False
    owner = _read(folder)
    if not owner:
        return False
    if owner.get("machine") == _machine():
        if not locked and _lives(owner):
            raise UserError(_busy(folder, owner))
        return False
    # Told by its content, not by its time: that another machine's clock has set.
    print(
        f"note: {folder} was last written by {_who(owner)}; waits {STALE_SECS:.0f} s to see "
        "whether that is still at work",
        file=sys.stderr,
        flush=True,
    )
    end = time.monotonic() + STALE_SECS
    while time.monotonic() < end:
        time.sleep(min(1.0, STALE_SECS / 10))
        if (now := _read(folder)) != owner:
            if not now:
                return True
            raise UserError(_busy(folder, now))
    return True


def _busy(folder: Path, owner: dict[str, Any]) -> str:
    return (
        f"another albert_jax.prepare is writing {folder} ({_who(owner)}); let it finish, or stop "
        "it."
    )


def _who(owner: dict[str, Any]) -> str:
    if "host" not in owner:
        return "a process that says nothing of itself"
    return f"process {owner.get('process')} of {owner['host']}, since {owner.get('since')}"


def _lives(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine is there."""
    process = owner.get("process")
    if not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def _machine() -> str:
    """What tells this machine, since it was started, and this container of it from others."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{socket.gethostname()} {uuid.getnode()}"


def _read(folder: Path) -> dict[str, Any]:
    # Opened each time: only then does NFS look whether the file has changed.
    try:
        owner = json.loads((folder / LOCK).read_bytes() or b"{}")
    except ValueError:
        owner = {"id": ""}
    return owner if isinstance(owner, dict) else {"id": ""}


def _write(file: int, owner: dict[str, Any]) -> None:
    content = json.dumps({**owner, "beat": time.monotonic()}).encode()
    os.pwrite(file, content.ljust(_CONTENT_BYTES), 0)
    os.fsync(file)
