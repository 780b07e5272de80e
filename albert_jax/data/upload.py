"""A store that is prepared for a bucket: made on the local disk, then copied there.

In:  a place, gs://BUCKET/STORE; what decides the work; and how to make the store in a local folder.
Out: the store at the place, and its local copy where `store.open_store` looks for it.

There is no renaming in a bucket: the manifest makes a folder a store, and is written last. The
shards that are finished wait on this machine, under the cache (see `storage.cache_folder`), so a
job that was killed goes on with `--resume` from there, on this machine; objects that are there
already are not sent again. One job at a time writes to a place.
"""

import concurrent.futures
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from albert_jax import progress as progress_lib
from albert_jax import storage
from albert_jax.data import store
from albert_jax.data import tokenizer as tokenizer_lib
from albert_jax.errors import UserError

_LOCK = ".lock"
_AT_ONCE = 8  # files
_SHARD_FILE = re.compile(rf"({'|'.join(store.SPLITS)})/[\w-]+\.({'|'.join(store.ARRAYS)})\.npy")


def prepare(
    place: str, decisive: dict[str, Any], resume: bool, make: Callable[[Path], store.Store]
) -> store.Store:
    """Makes a store locally and puts it there.

    Args:
        place: of the store to be.
        decisive: all that decides the work, as JSON.
        resume: go on with what was begun.
        make: makes the store in the folder that it is given, which must not be there yet; goes on
            with what an earlier call left beside it.

    Raises:
        UserError: something else is there, or is being written there; the bucket cannot be written;
            as `make`.
    """
    place = storage.named(place)
    told = json.dumps([place, decisive], sort_keys=True).encode()
    folder = storage.cache_folder() / "prepared" / hashlib.sha256(told).hexdigest()[:32]
    busy = f"another albert_jax.prepare is writing {place}: {{}}; let it finish, or stop it."
    with storage.Claim(storage.join(place, _LOCK), busy) as claim:
        _refuse_taken(place, resume)
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = store.open_store(folder) if folder.exists() else make(folder)
        claim.check()
        _upload(made, place, claim)
    copy = store.copy_folder(made.fingerprint)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if copy.exists():
        shutil.rmtree(folder)
    else:
        folder.replace(copy)
    return store.open_store(place)


def _refuse_taken(place: str, resume: bool) -> None:
    names = [name for name in storage.listing(place) if name != _LOCK]
    if store.MANIFEST in names:
        raise UserError(
            f"{place} is a token store already; choose another --output, or delete it first."
        )
    foreign = [
        name
        for name in names
        if not _SHARD_FILE.fullmatch(name) and name not in tokenizer_lib.FILES
    ]
    if foreign:
        raise UserError(
            f"{place} holds something else ({foreign[0]}); choose another --output. Nothing was "
            "changed."
        )
    if names and not resume:
        raise UserError(
            f"{place} holds an unfinished store; add --resume to go on with it, or delete it to "
            "start over."
        )


def _upload(made: store.Store, place: str, claim: storage.Claim) -> None:
    files = {
        path.relative_to(made.path).as_posix(): path
        for path in sorted(made.path.rglob("*"))
        if path.is_file()
    }
    manifest = files.pop(store.MANIFEST)
    for name in storage.listing(place):  # of an earlier job with other options
        if name not in files and name != _LOCK:
            storage.delete(storage.join(place, name))

    def send(name: str) -> int:
        if not storage.holds(storage.join(place, name), files[name]):
            storage.upload(files[name], storage.join(place, name))
        return files[name].stat().st_size

    total = sum(path.stat().st_size for path in files.values())
    with progress_lib.Progress("upload", total, "B") as progress:
        pool = concurrent.futures.ThreadPoolExecutor(_AT_ONCE)
        try:
            for sent in concurrent.futures.as_completed(
                [pool.submit(send, name) for name in files]
            ):
                progress.advance(sent.result())
        except UserError as error:
            raise UserError(
                f"{error} The store is whole in {made.path}; the same command with --resume copies "
                "what is missing."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    claim.check()
    storage.upload(manifest, storage.join(place, store.MANIFEST))
