"""Keeps a compiled step in a folder, so that a slice that starts does not wait for the compiler.

In:  a folder (a bucket, gs://..., where several hosts must see it) and a lowered program.
Out: the compiled program, out of the folder if it is there, otherwise compiled and kept.

JAX's persistent compilation cache does the work. It looks a program up by a hash of everything that
makes it: the program's text, jaxlib's and the compiler's versions, flags and options, the topology,
and which device stands where. So what is found is what would have been compiled, and anything else
is compiled. Its files hold the compiler's own serialised executables; nothing is unpickled. Beside
them `made_for.json` says for people what was compiled, so that a miss can be explained.

Programs compiled ahead of time for a described topology are written under that hash too. Whether a
slice computes the same hash for itself could not be tried without one: text and versions are the
same by construction, the topology's fingerprint is libtpu's affair. If it does not, the slice
compiles once and keeps its own in the same folder.
"""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh

from albert_jax.config import Config
from albert_jax.errors import UserError

FOLDER = "compilation_cache"  # of a workdir
_MANIFEST = "made_for.json"
_HIT = "/jax/compilation_cache/cache_hits"


class Cache:
    """A folder of compiled programs. From here on JAX keeps there whatever it compiles.

    Args:
        directory: made when it is needed.
        described: the devices are only described. Programs for them can be kept but not loaded,
            so they are always compiled; and of all programs only those are kept.

    Attributes:
        loaded: whether the last program was in the folder.
    """

    def __init__(self, directory: str, described: bool = False) -> None:
        self.loaded = False
        self._directory, self._described = directory, described
        if not described:
            _configure(_keeping_in(directory))

    def compile(
        self, lowered: jax.stages.Lowered, options: Mapping[str, str]
    ) -> jax.stages.Compiled:
        """The compiled program.

        Raises:
            UserError: the folder cannot be written, or the compiler gives nothing to keep.
        """
        if self._described:
            return self._compile_and_keep(lowered, options)
        hits: list[str] = []

        def count(event: str, **_: Any) -> None:
            if event == _HIT:
                hits.append(event)

        jax.monitoring.register_event_listener(count)
        try:
            compiled = lowered.compile(dict(options))
        finally:
            jax.monitoring.unregister_event_listener(count)
        self.loaded = bool(hits)
        return compiled

    def account(self, config: Config, mesh: Mesh) -> str:
        """Notes what was compiled for, and says in a line whether it was loaded; if not, in what it
        differs from what was kept before.
        """
        if self.loaded:
            return f"loaded the compiled step from {self._directory}"
        here, manifest = _made_for(config, mesh), epath.Path(self._directory) / _MANIFEST
        there = json.loads(manifest.read_text()) if manifest.exists() else {}
        if jax.process_index() == 0:
            manifest.write_text(json.dumps(here, indent=2) + "\n")
        if self._described or not there:
            return f"kept the compiled step in {self._directory}"
        changed = [
            f"{name} was {there.get(name)}, is {value}"
            for name, value in here.items()
            if there.get(name) != value
        ]
        why = "; ".join(changed) or "the compiler or the devices' order are not those it was for"
        return f"the compiled step in {self._directory} is another ({why}); compiled and kept anew"

    def _compile_and_keep(
        self, lowered: jax.stages.Lowered, options: Mapping[str, str]
    ) -> jax.stages.Compiled:
        # An empty folder, because JAX would try to load what it finds.
        with tempfile.TemporaryDirectory() as empty:
            with _cache_in(empty):
                compiled = lowered.compile(dict(options))
            entries = list(pathlib.Path(empty).glob("*-cache"))
            if not entries:
                raise UserError(
                    f"--save={self._directory}: this compiler gives nothing that can be kept."
                )
            target = epath.Path(self._directory)
            try:
                target.mkdir(parents=True, exist_ok=True)
                for entry in entries:
                    (target / entry.name).write_bytes(entry.read_bytes())
            except OSError as error:
                raise UserError(f"--save={self._directory}: {error.strerror or error}.") from None
        return compiled


@contextmanager
def _cache_in(directory: str) -> Iterator[None]:
    """JAX keeps every program compiled inside, and nothing before or after, in `directory`."""
    settings = _keeping_in(directory)
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    try:
        yield
    finally:
        _configure(before)


def _keeping_in(directory: str) -> dict[str, Any]:
    return {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        # Folders of the compiler's own would become part of the hash.
        "jax_persistent_cache_enable_xla_caches": "none",
    }


def _configure(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # JAX looks up the folder once; this makes it look again


def _made_for(config: Config, mesh: Mesh) -> dict[str, str]:
    """What a compiled step depends on, for people to read."""
    device = mesh.devices.flat[0]
    facts = {
        "jax": jax.__version__,
        "compiler": " ".join(device.client.platform_version.split()),
        "devices": f"{mesh.size} x {device.device_kind}",
        "mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
    }
    for section in ("model", "data", "train", "optimizer", "log"):
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            if name not in ("path", "store_fingerprint", "seed"):
                facts[f"{section}.{name}"] = str(value)
    return facts
