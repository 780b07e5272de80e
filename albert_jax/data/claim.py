"""The folder where a store grows: held by one job at a time, kept when it is of use.

A store grows in `STORE.unfinished`. Beside the shards are `options.json`, what the job was begun
with, which a job that resumes must share, and a lock.
"""

import contextlib
import errno
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from albert_jax.data import lease, store
from albert_jax.errors import UserError


def refuse_taken(path: Path) -> None:
    """Raises UserError where the store is to be and something is already."""
    if (path / store.MANIFEST).exists():
        raise UserError(
            f"{path} is a token store already; choose another --output, or delete it first."
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"{path} holds something else; choose another --output. Nothing was changed."
        )


@contextlib.contextmanager
def claimed(folder: Path, ours: dict[str, Any], resume: bool) -> Iterator[Callable[[], None]]:
    """Holds the folder for this process; to resume, what is in it must be the same work.

    Args:
        folder: where the store grows; made if it is not there.
        ours: all that decides the work, as JSON.
        resume: whether what is there already is gone on with.

    Yields:
        What to call before the last step, see `lease.held`.

    Raises:
        UserError: it holds something else, another's work, or other work than ours.
    """
    begun = folder / "options.json"
    if (
        not begun.exists()
        and folder.exists()
        and {path.name for path in folder.iterdir()} - {lease.LOCK}
    ):
        raise UserError(
            f"{folder} holds something else; choose another --output. Nothing was changed."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with lease.held(folder) as check:
        if not begun.exists():
            store.write_json(begun, ours)
        elif not resume:
            raise UserError(
                f"{folder} holds an unfinished store; "
                "add --resume to go on with it, or delete it to start over."
            )
        else:
            theirs = json.loads(begun.read_bytes())
            differing = [
                f"{key}: {theirs.get(key)} there, {ours[key]} now"
                for key in ours
                if theirs.get(key) != ours[key]
            ]
            if differing:
                raise UserError(
                    f"{folder} was begun with other options ({'; '.join(differing)}); "
                    "give the same ones, or delete it to start over."
                )
        yield check


@contextlib.contextmanager
def kept_if_useful(folder: Path) -> Iterator[None]:
    """After a failure keeps what another run can go on with, and says so; else nothing."""
    try:
        yield
    except BaseException as error:
        finished = len(list(folder.glob("*-of-*.json")))
        if not finished and not any(folder.glob("*/*-of-*.json")):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        kept = (
            f"Shards finished so far: {finished}, kept in {folder}; "
            "the same command with --resume goes on from there."
        )
        if isinstance(error, OSError):
            raise UserError(f"{why_not_written(error, folder)}\n{kept}") from error
        if isinstance(error, UserError):
            raise UserError(f"{error}\n{kept}") from error
        if isinstance(error, KeyboardInterrupt):
            print(kept, file=sys.stderr)
        raise


def tidy(folder: Path, tokenizer: str) -> None:
    """Removes what only the work needed, and what was left of files by a writer that was killed."""
    for path in folder.iterdir():
        if path.is_file() and path.name not in (tokenizer, store.MANIFEST):
            path.unlink()
    for split in store.SPLITS:
        for path in (folder / split).glob(f"*{store.UNFINISHED}"):
            path.unlink()


def why_not_written(error: OSError, folder: Path) -> str:
    """What an error of the system means to the person who waits for the store."""
    what = f"{error.filename or folder}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full, or a limit on files is reached ({what}). A store takes about half "
            "the room of its text."
        )
    return f"the system refused: {what}."
