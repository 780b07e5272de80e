"""A step that is kept is loaded by the next process, gives the same numbers, and only if it is the
very same step.
"""

import json
import subprocess
import sys

import pytest

# One process of a run: compiles or loads, makes one step, prints its figures.
PROCESS = """
import json, sys
import jax, jax.numpy as jnp
from albert_jax import config
from albert_jax.training import compilation_cache, sharding

rate = float(sys.argv[2])
cfg = config.resolve({"optimizer": {"learning_rate": rate}})
mesh = sharding.make_mesh(cfg, jax.devices())
lowered = jax.jit(lambda x: jnp.tanh(x @ x.T * rate).sum(axis=1)).lower(jnp.eye(16))
cache = compilation_cache.Cache(sys.argv[1])
compiled = cache.compile(lowered, {})
figures = [float(x).hex() for x in compiled(jnp.eye(16))]
print(json.dumps({"loaded": cache.loaded, "line": cache.account(cfg, mesh), "figures": figures}))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Three processes one after the other; the third has another learning rate."""
    folder = str(tmp_path_factory.mktemp("kept"))
    results = []
    for rate in ("0.001", "0.001", "0.002"):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, folder, rate], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # quiet
        results.append(json.loads(done.stdout))
    return results


def test_the_next_process_loads_what_was_kept_and_gets_the_same_numbers(processes):
    first, second, _ = processes
    assert (first["loaded"], second["loaded"]) == (False, True)
    assert first["figures"] == second["figures"]
    assert second["line"].startswith("loaded the compiled step from")


def test_another_step_is_compiled_and_the_difference_named(processes):
    third = processes[2]
    assert not third["loaded"]
    assert "optimizer.learning_rate was 0.001, is 0.002" in third["line"]
