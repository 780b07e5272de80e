"""Strict JAX on eight pretend CPU devices, one cache of compiled programs, the longest files first,
and where the shared data lies.
"""

import atexit
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

# Before anything imports jax: tests run on the CPU wherever they run, and may run side by side.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# What one test compiles is loaded by all others, by both workers and by the commands that they
# start: the same program in several processes is most of what this suite would wait for. A folder
# that is named outside is kept for the next session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="albert_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

# The commands that tests start import TensorFlow, PyTorch and JAX, half of which is compiling their
# sources where the environment forbids to keep the result. Kept here it disturbs nobody's sources.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ["PYTHONPYCACHEPREFIX"] = str(pathlib.Path(sys.prefix) / "bytecode")
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Now, so with the flags above: those that a test sets are for the processes it starts.
jax.devices()
# A shell's job in the background ignores Ctrl-C, and so would the commands that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Each takes a minute or more; begun last, one would keep a single worker busy at the end.
LONGEST = (
    "distributed/test_processes.py",
    "test_bucket_runs.py",
    "training/test_loop.py",
    "compiling/test_train_step.py",
    "tasks/test_finetuning.py",
    "model/test_encoder.py",
    "training/test_distillation.py",
    "distributed/test_meshes.py",
    "tasks/test_predictor.py",
    "test_google_reference.py",
    "training/test_layer_decay.py",
    "test_prepare.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; else as they were."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="module")
def compiles_fast() -> Iterator[None]:
    """For modules whose time is XLA's and whose subject is no matter of its optimizations: the
    programs of this process and of the commands that it starts.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real test data; the test is skipped where it is missing."""
    path = pathlib.Path(os.environ.get("ALBERT_JAX_TEST_DATA", ROOT / ".." / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; set ALBERT_JAX_TEST_DATA")
    return path.resolve()
