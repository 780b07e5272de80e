"""Strict JAX on eight pretend CPU devices, and where the shared data lies."""

import os
import pathlib

# Before anything imports jax: tests run on the CPU wherever they run, and may run side by side.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real test data; the test is skipped where it is missing."""
    path = pathlib.Path(os.environ.get("ALBERT_JAX_TEST_DATA", ROOT / ".." / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; set ALBERT_JAX_TEST_DATA")
    return path.resolve()
