"""What lies in a bucket: the one door to gs://.

In:  places, as text: gs://BUCKET/NAME. (`pathlib.Path` makes gs:/BUCKET/NAME of it, which is
     understood as well, so that a command's flags may be paths.)
Out: bytes, listings, local files; a claim on a place that one process at a time has.

Promises:
- An object is there whole or not at all. A folder is only a beginning of names; nothing is renamed.
- A request that fails for a reason that may pass (the server's 5xx and 429, a lost connection,
  silence) is sent again until `patience()` seconds have gone by; that it does so is said once. Then
  it is a `LostError`. What cannot pass (no such bucket, no rights) is a `UserError` at once.
- A place on the local disk is none of this module's business, and costs it nothing: gcsfs is
  imported for the first gs:// place.

gcsfs speaks the protocol. Orbax's own requests go through the same file system (etils finds it),
but for its arrays, which TensorStore sends: `checkpoint_folder` gives it the same patience.
"""

import asyncio
import base64
import contextlib
import errno
import functools
import hashlib
import inspect
import io
import json
import logging
import os
import random
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, BinaryIO, Self

from albert_jax.errors import UserError

PATIENCE = "ALBERT_JAX_STORAGE_SECONDS"  # environment variable
CACHE = "ALBERT_JAX_CACHE"  # environment variable

_SCHEME = re.compile(r"gs:/+")
_ANY_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:/")
_USUAL_PATIENCE = 300.0  # seconds
_SILENCE = 30.0  # seconds without a byte, and a request counts as failed
_LONGEST_PAUSE = 8.0  # seconds between two tries
_BLOCK = 16 << 20  # bytes of a download in one request
_GLOB = re.compile(r"[*?\[]")


class LostError(UserError):
    """A bucket that did not answer in time."""


def is_lost(error: BaseException | None) -> bool:
    """Whether a bucket that did not answer is what is behind an error."""
    while error is not None:
        if isinstance(error, LostError):
            return True
        error = error.__cause__
    return False


def is_remote(place: str | PurePath) -> bool:
    """Whether a place is in a bucket.

    Raises:
        UserError: a scheme that is not known here.
    """
    if _SCHEME.match(str(place)):
        return True
    if found := _ANY_SCHEME.match(str(place)):
        raise UserError(
            f"{place}: of remote places only gs:// is known here, not {found[0]}/; mount it, or "
            "copy it to this machine."
        )
    return False


def named(place: str | PurePath) -> str:
    """A remote place as it is usually written: gs://BUCKET/NAME, no slash at the end."""
    return "gs://" + _key(place)


def join(place: str | PurePath, *names: str) -> str:
    """A place under another."""
    return "/".join([named(place), *names])


def patience() -> float:
    """Seconds for which a failing request is sent again.

    Raises:
        UserError: the environment variable is no number.
    """
    text = os.environ.get(PATIENCE, "")
    try:
        return float(text or _USUAL_PATIENCE)
    except ValueError:
        raise UserError(f"{PATIENCE}={text} is no number of seconds.") from None


def cache_folder() -> Path:
    """Where local copies are kept: $ALBERT_JAX_CACHE, or ~/.cache/albert_jax."""
    given = os.environ.get(CACHE)
    return Path(given) if given else Path.home() / ".cache" / "albert_jax"


# Objects


def read(place: str | PurePath) -> bytes:
    """A whole object.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be had.
    """
    with _asking(place):
        return _files().cat_file(_key(place))


def write(place: str | PurePath, content: bytes) -> None:
    """Puts a whole object there, in the place of what is there."""
    with _asking(place):
        _files().pipe_file(_key(place), content)


def exists(place: str | PurePath) -> bool:
    """Whether there is an object, or a folder."""
    with _asking(place):
        return _files().exists(_key(place))


def size(place: str | PurePath) -> int:
    """Bytes of an object.

    Raises:
        FileNotFoundError: there is none.
    """
    with _asking(place):
        return _files().info(_key(place))["size"]


def state(place: str | PurePath) -> list[int]:
    """What changes when an object is written anew: its size and generation.

    Raises:
        FileNotFoundError: there is none.
    """
    with _asking(place):
        info = _files().info(_key(place))
        return [info["size"], int(info.get("generation") or 0)]


def listing(place: str | PurePath) -> dict[str, int]:
    """The objects in a folder and below it: names from there on, and bytes; sorted."""
    key = _key(place)
    with _asking(place):
        try:
            found = _files().find(key, detail=True)
        except FileNotFoundError:  # of the bucket itself
            if not exists(f"gs://{key.partition('/')[0]}"):
                raise
            return {}
    return {
        name.removeprefix(key + "/"): info["size"]
        for name, info in sorted(found.items())
        if name != key and not name.endswith("/")
    }


def glob(pattern: str) -> list[str]:
    """The objects that a pattern names, sorted; ** stands for folders too, as in `glob.glob`."""
    key = _key(pattern)
    with _asking(pattern):
        if not _GLOB.search(key):
            return [named(pattern)] if _files().isfile(key) else []
        return [f"gs://{name}" for name in sorted(_files().glob(key)) if not name.endswith("/")]


def opened(place: str | PurePath) -> BinaryIO:
    """A local file or an object, to read from and to seek in.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(place):
        return Path(place).open("rb")
    with _asking(place):
        file = _files().open(_key(place), "rb", block_size=_BLOCK >> 1, cache_type="readahead")
    return io.BufferedReader(_Asked(file, named(place)), 1 << 20)  # pyright: ignore[reportArgumentType]


def content(place: str | PurePath) -> bytes:
    """A whole local file or object.

    Raises:
        OSError: there is none (FileNotFoundError), or the file cannot be read.
    """
    try:
        return read(place) if is_remote(place) else Path(place).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place)) from None


def save(place: str | PurePath, content: bytes) -> None:
    """Writes a local file or an object, in the place of what is there.

    Raises:
        UserError: it cannot be written.
    """
    if is_remote(place):
        write(place, content)
        return
    try:
        Path(place).write_bytes(content)
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error.strerror}.") from None


def download(
    place: str | PurePath, path: Path, advance: Callable[[int], None] = lambda size: None
) -> str:
    """Copies an object to a local file, and that to the disk itself.

    Args:
        place: of the object.
        path: of the file, which is written over; one that was cut off must not be taken for whole.
        advance: told the bytes, as they come.

    Returns:
        The SHA-256 of what came, hexadecimal.

    Raises:
        FileNotFoundError: there is no such object.
        OSError: the local disk is full.
    """
    with _asking(place):
        total = _files().info(_key(place))["size"]
    found = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, total, _BLOCK):
            with _asking(place):
                block = _files().cat_file(_key(place), start, min(start + _BLOCK, total))
            found.update(block)
            file.write(block)
            advance(len(block))
        file.flush()
        os.fsync(file.fileno())
    return found.hexdigest()


def upload(path: Path, place: str | PurePath) -> None:
    """Copies a local file to an object; its MD5 is compared on arrival."""
    with _asking(place):
        _files().put_file(str(path), _key(place), consistency="md5")


def holds(place: str | PurePath, path: Path) -> bool:
    """Whether an object is there that has the bytes of a local file, by size and MD5."""
    with _asking(place):
        try:
            info = _files().info(_key(place))
        except FileNotFoundError:
            return False
    if info.get("size") != path.stat().st_size:
        return False
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").digest()
    return base64.b64encode(found).decode() == info.get("md5Hash")


def delete(place: str | PurePath) -> None:
    """Deletes an object, if it is there."""
    with _asking(place), contextlib.suppress(FileNotFoundError):
        _files().rm_file(_key(place))


def delete_folder(place: str | PurePath) -> None:
    """Deletes all objects in a folder and below it."""
    for name in listing(place):
        delete(join(place, name))


def write_if(place: str | PurePath, content: bytes, generation: int) -> int:
    """Writes an object if it still is of a generation; 0 is that of none being there.

    Returns:
        Its new generation.

    Raises:
        FileExistsError: it is of another generation.
    """
    bucket, _, name = _key(place).partition("/")
    files = _files()
    with _asking(place):
        _, answer = files.call(
            "POST",
            f"{files._location}/upload/storage/v1/b/{bucket}/o",
            uploadType="media",
            name=name,
            ifGenerationMatch=str(generation),
            data=content,
        )
    return int(json.loads(answer)["generation"])


# Whose a place is


class Claim:
    """A place that this process alone writes to, as long as the claim is open.

    The claim is an object that its owner writes anew every `BEAT` seconds, each time only if it is
    still as it was left. One that was not renewed for `STALE` seconds, or whose process is known to
    have died (it was of this machine), is taken over.

    Args:
        place: of the object.
        busy: what to say, with the owner in the place of {}, where another has it.

    Raises:
        UserError: another process has it.
    """

    BEAT, STALE = 10.0, 45.0

    def __init__(self, place: str, busy: str) -> None:
        self._place, self._busy = place, busy
        self._owner = {
            "id": uuid.uuid4().hex,
            "machine": _machine(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        self._beats = 0
        _ours.add(self._owner["id"])
        self._generation = self._take()
        self._over = threading.Event()
        self._failure: UserError | None = None
        self._beating = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._beating.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if is_lost(error):
            return  # it is known to be ours by our death
        self._beating.join()
        if self._failure is None:
            with contextlib.suppress(UserError) if error else contextlib.nullcontext():
                delete(self._place)

    def check(self) -> None:
        """Raises UserError where the claim was lost to another process."""
        if self._failure is not None:
            raise self._failure

    def _take(self) -> int:
        seen, deadline, told = 0, 0.0, False
        while True:
            try:
                return write_if(self._place, self._content(), 0)
            except FileExistsError:
                pass
            try:
                owner, generation = self._look()
            except FileNotFoundError:
                continue  # just given back
            if owner == self._owner["id"]:  # ours: the answer was lost, not the request
                return generation
            if generation != seen:
                if seen:
                    raise UserError(self._busy.format(_who(owner)))
                seen, deadline = generation, time.monotonic() + self.STALE
            if _has_died(owner) or time.monotonic() > deadline:
                with contextlib.suppress(FileExistsError):  # somebody else was quicker
                    return write_if(self._place, self._content(), generation)
                continue
            if not told:
                told = True
                _say(
                    f"{self._place} is claimed by {_who(owner)}; waits {self.STALE:.0f} s to see "
                    "whether that is still at work"
                )
            time.sleep(1.0)

    def _look(self) -> tuple[Any, int]:
        with _asking(self._place):
            generation = int(_files().info(_key(self._place))["generation"])
        try:
            owner = json.loads(read(self._place))
        except ValueError:
            owner = {}
        mine = isinstance(owner, dict) and owner.get("id") == self._owner["id"]
        return (self._owner["id"] if mine else owner), generation

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "beats": self._beats}).encode()

    def _beat(self) -> None:
        while not self._over.wait(self.BEAT):
            self._beats += 1
            try:
                self._generation = write_if(self._place, self._content(), self._generation)
            except FileExistsError:
                with contextlib.suppress(UserError, FileNotFoundError):
                    owner, generation = self._look()
                    if owner == self._owner["id"]:
                        self._generation = generation
                        continue
                    self._failure = UserError(self._busy.format(_who(owner)))
                    return
            except UserError:
                continue  # the bucket is gone for now; whoever writes there says so


_ours: set[str] = set()  # the owners that this process is or was


def _machine() -> str:
    """What tells this machine, and this container of it, from others."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{socket.gethostname()} {uuid.getnode()}"


def _has_died(owner: Any) -> bool:
    if not isinstance(owner, dict) or owner.get("machine") != _machine():
        return False
    process = owner.get("process")
    if process == os.getpid():
        return owner.get("id") not in _ours  # of one that had our number before us
    if not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _who(owner: Any) -> str:
    if not isinstance(owner, dict) or "host" not in owner:
        return "another process"
    return f"process {owner.get('process')} of {owner['host']}, since {owner.get('since')}"


# Checkpoints


def checkpoint_folder(place: str) -> Any:
    """A place as Orbax wants it: an `epath.Path`, with requests as patient as ours."""
    _files()
    from etils import epath
    from orbax.checkpoint._src.serialization import tensorstore_utils

    # TensorStore waits 1, 2, 4, … and then 32 s between two tries.
    pauses, total = 0, 0.0
    while total < patience():
        total += min(32.0, 2.0**pauses)
        pauses += 1
    retries = {"max_retries": max(1, pauses), "initial_delay": "1s", "max_delay": "32s"}
    # Orbax makes every context of these, and has no other door to it.
    for context in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
        getattr(tensorstore_utils, context)["gcs_request_retries"] = retries
    return epath.Path(named(place))


# Requests


def _key(place: str | PurePath) -> str:
    """BUCKET/NAME."""
    return _SCHEME.sub("", str(place), count=1).rstrip("/")


@functools.cache
def _files() -> Any:
    """The file system of buckets. Every other library that asks fsspec or etils gets this one."""
    # etils would take TensorFlow's client, which knows no emulator and is slow to import; gcsfs
    # would ask every bucket over gRPC what kind it is.
    os.environ.setdefault("EPATH_USE_TF", "false")
    if etils_paths := sys.modules.get("etils.epath.gpath"):
        etils_paths._is_tf_installed.cache_clear()  # asked already, for a path on the disk
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(round(_silence())))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    try:
        import aiohttp
        import fsspec
        import gcsfs
    except ImportError as error:
        raise UserError(
            f"gs:// needs the package {error.name}: pip install 'albert-jax[gcs]'."
        ) from None
    for chatty in ("gcsfs", "google.auth", "google.auth._default"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)  # its errors are ours to tell
    request = inspect.unwrap(gcsfs.GCSFileSystem._request)

    class Bucket(gcsfs.GCSFileSystem):
        """gcsfs with our patience, and nothing remembered of what others may change."""

        def __init__(self, **options: Any) -> None:
            options.setdefault("token", _token())
            options.setdefault("use_listings_cache", False)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=15.0, sock_read=_silence())
            options.setdefault("requests_timeout", timeout)
            super().__init__(**options)

        async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
            place = _place_of(path, args)
            deadline = time.monotonic() + patience()
            pause = 0.5
            while True:
                try:
                    answer = await request(self, method, path, *args, **kwargs)
                except Exception as error:
                    if not _may_pass(error):
                        raise
                    if time.monotonic() >= deadline:
                        raise LostError(
                            f"{place} could not be reached for {patience():.0f} s "
                            f"({_reason(error)}). Is the bucket there, and the network? {PATIENCE} "
                            "sets how long it is tried."
                        ) from None
                    _trouble.begin(place, _reason(error))
                    await asyncio.sleep(min(pause * (0.75 + random.random() / 2), 0.2 * patience()))
                    pause = min(2 * pause, _LONGEST_PAUSE)
                else:
                    _trouble.end()
                    return answer

    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, Bucket, clobber=True)
    return fsspec.filesystem("gcs")


def in_use() -> bool:
    """Whether this process has asked for anything in a bucket."""
    return _files.cache_info().currsize > 0


def _silence() -> float:
    return max(1.0, min(_SILENCE, patience()))


def _token() -> str:
    """How to say who we are: as Google's tools do, and where there is no account, not at all."""
    import google.auth
    from google.auth.exceptions import GoogleAuthError

    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return "anon"
    try:
        google.auth.default()
    except GoogleAuthError:
        return "anon"
    return "google_default"


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    from gcsfs import retry

    return retry.is_retriable(error) or isinstance(error, (TimeoutError, ConnectionError))


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0].strip(", ")
    code = getattr(error, "code", None)
    if code and str(code) not in text:
        text = f"{text} {code}".strip()
    return f"it answers {text}" if code else f"{type(error).__name__}: {text}".strip(": ")


def _place_of(path: str, args: tuple[Any, ...]) -> str:
    bucket = args[0] if args else ""
    if not bucket and (found := re.search(r"/b/([^/?]+)", path)):
        bucket = found[1]
    return f"gs://{bucket}" if bucket else "gs://"


@contextlib.contextmanager
def _asking(place: str | PurePath) -> Iterator[None]:
    """What gcsfs says of a failure, in words for a person."""
    try:
        yield
    except (UserError, FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        code = getattr(error, "code", None)
        if str(error).startswith("Forbidden") or str(code) in ("401", "403"):
            raise UserError(
                f"{named(place)} may not be reached with the account of this machine "
                f"({' '.join(str(error).split())}). Log in with gcloud auth application-default "
                "login, or give the account the role Storage Object Admin on the bucket."
            ) from None
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the local disk
        raise UserError(
            f"{named(place)} could not be reached: {_reason(error)}. Is the bucket's name right?"
        ) from error


class _Trouble:
    """Tells a person once that a bucket does not answer, and once that it does again."""

    def __init__(self) -> None:
        self._since = 0.0
        self._lock = threading.Lock()

    def begin(self, place: str, reason: str) -> None:
        with self._lock:
            if not self._since:
                self._since = time.monotonic()
                _say(f"{place} does not answer ({reason}); is tried for {patience():.0f} s")

    def end(self) -> None:
        if not self._since:
            return
        with self._lock:
            if self._since:
                _say(f"the bucket answers again, after {time.monotonic() - self._since:.0f} s")
                self._since = 0.0


_trouble = _Trouble()


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)


class _Asked(io.RawIOBase):
    """A remote file whose failures are told as ours."""

    def __init__(self, file: Any, place: str) -> None:
        self._file, self._place = file, place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with _asking(self._place):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()
