"""A run through the commands: what it leaves, and that stopping it anywhere changes nothing."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import pytest
import small_store

from albert_jax import config
from albert_jax.data import pipeline
from albert_jax.data import store as store_lib
from albert_jax.training import goodput, hosts, loop, objectives, pretraining, program, sharding

pytestmark = pytest.mark.usefixtures("compiles_fast")
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
STEPS = 40
CONFIG = (
    f"--config={ROOT / 'configs' / 'tiny.py'}",
    f"--config.train.steps={STEPS}",
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=48",
    "--config.model.hidden_dropout_prob=0.1",
    "--config.data.max_seq_length=32",
    "--config.data.max_predictions_per_seq=5",
    "--config.optimizer.warmup_steps=5",
    "--config.log.every_steps=1",
    "--config.eval.every_steps=20",
    "--config.checkpoint.every_steps=7",
)
# What a line may differ in between two runs: how long things took.
TIMES = {"examples_per_second", "step_seconds", "data_wait_seconds", "model_flops_utilization"}
TOTALS = {f"total_{kind}_seconds" for kind in goodput.KINDS}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_store.make(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    small_store.run_command("train", *arguments(store, workdir), "--profile=3:4")
    return workdir


def arguments(store: pathlib.Path, workdir: pathlib.Path) -> tuple[str, ...]:
    return (*CONFIG, f"--config.data.path={store}", f"--workdir={workdir}")


def rows(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def numbers(workdir: pathlib.Path) -> list[dict]:
    left_out = {"goodput"} | TIMES | TOTALS
    return [{k: v for k, v in row.items() if k not in left_out} for row in rows(workdir)]


def test_a_run_leaves_what_the_contract_says(undisturbed):
    train = [row for row in rows(undisturbed) if "split" not in row]
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert set(train[0]) >= {
        "step",
        "learning_rate",
        "goodput",
        "loss",
        "grad_norm",
        *objectives.MASKED_LM_METRICS,
        *TIMES,
        *TOTALS,
    }
    validation = [row for row in rows(undisturbed) if row.get("split") == "validation"]
    assert [row["step"] for row in validation] == [20, 40]
    assert validation[-1]["masked_lm_loss"] < train[0]["masked_lm_loss"]
    assert json.loads((undisturbed / "config.json").read_text())["model"]["vocab_size"] == 60
    pictures = sorted(path.name for path in (undisturbed / "report").glob("*.png"))
    assert {"overview.png", "masked_lm_loss.png", "accuracy.png", "learning_rate.png"} <= set(
        pictures
    )
    assert list((undisturbed / "tensorboard").iterdir())
    (trace,) = undisturbed.glob("profile/plugins/profile/*/*.xplane.pb")
    assert b"train_step" in trace.read_bytes()


def test_killed_anywhere_the_run_gives_the_same_numbers(undisturbed, store, tmp_path):
    workdir, rng = tmp_path / "killed", random.Random(5)
    for target in (2, 13, 25):
        process = subprocess.Popen(
            small_store.command("train", *arguments(store, workdir)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_lines(workdir, target, process)
        time.sleep(rng.random() * 0.2)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = small_store.run_command("train", *arguments(store, workdir))
    assert numbers(workdir) == numbers(undisturbed)
    # Four lives had four starts, and steps that were made twice; nothing else took longer for it.
    assert "restart" in done.stderr
    last, reference = rows(workdir)[-1], rows(undisturbed)[-1]
    assert last["total_restart_seconds"] > 2 * reference["total_restart_seconds"]
    assert last["goodput"] < reference["goodput"]
    assert last["goodput"] == pytest.approx(
        last["total_step_seconds"] / sum(last[name] for name in TOTALS), rel=1e-3
    )


def test_sigterm_saves_and_the_run_goes_on_with_other_devices(undisturbed, store, tmp_path):
    workdir = tmp_path / "stopped"
    for devices, target in ((1, 6), (2, 20), (4, None)):
        process = subprocess.Popen(
            small_store.command("train", *arguments(store, workdir)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        )
        if target:
            wait_for_lines(workdir, target, process)
            process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
        assert process.returncode == (1 if target else 0), output
        if target:
            saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
            assert f"SIGTERM: saved step {saved} of {STEPS}" in output
            assert rows(workdir)[-1]["step"] <= saved
    for ours, theirs in zip(numbers(workdir), numbers(undisturbed), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_another_config_in_the_workdir_is_refused_by_field(undisturbed, store):
    done = small_store.run_here(
        "train", *arguments(store, undisturbed), "--config.optimizer.learning_rate=0.5", expect=1
    )
    assert "optimizer.learning_rate: 0.00" in done.stderr
    assert "Traceback" not in done.stderr


def test_losses_that_are_not_finite_stop_the_run_when_too_many_batches_were_left_out(
    store, tmp_path
):
    done = small_store.run_here(
        "train",
        *arguments(store, tmp_path / "bad"),
        "--config.optimizer.learning_rate=1.0",
        "--config.optimizer.clip_norm=0",
        "--config.model.initializer_range=1e19",
        "--config.train.max_skipped_batches=2",
        expect=1,
    )
    assert "loss or gradient of step 1 is not finite; no checkpoint was saved yet" in done.stderr
    assert "Batches left out before: 0, 1; train.max_skipped_batches=2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("skipped", [[], [0], [16], [7, 6, 0], [9, 3, 4, 10]])
def test_steps_take_the_batches_that_are_not_skipped_in_order(skipped):
    taken = [pipeline.batch_number(step, skipped) for step in range(12)]
    assert taken == [number for number in range(20) if number not in skipped][:12]


@pytest.fixture(scope="module")
def poisoned(store) -> tuple[program.Program, store_lib.Store, int]:
    """A program in which the batch of step 17, number 16, has a loss that is not a number."""
    overrides = [text.removeprefix("--config.") for text in CONFIG[1:]]
    overrides += ["train.steps=25", "model.remat=none"]  # auto would build the program anew
    cfg = config.load(str(ROOT / "configs" / "tiny.py"), overrides)
    data = store_lib.open_store(store)
    cfg = pretraining.resolve(cfg, data)
    run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()[:1]))
    builder = pretraining.example_builder(cfg, data, "train")
    bad_BL = builder.batch(16 * 32, 17 * 32)["input_ids"]

    def train_step(state, batch, seed):
        weights_BP = jnp.where(
            jnp.all(batch["input_ids"] == bad_BL), jnp.nan, batch["masked_lm_weights"]
        )
        return run.train_step(state, {**batch, "masked_lm_weights": weights_BP}, seed)

    return dataclasses.replace(run, train_step=jax.jit(train_step, donate_argnums=0)), data, 16


def test_a_batch_that_is_not_finite_is_left_out_for_ever(poisoned, tmp_path, capfd):
    run, data, bad = poisoned
    told, found = tmp_path / "told", tmp_path / "found"
    told.mkdir()
    (told / "skipped_batches.json").write_text(f"[{bad}]")
    assert loop.train(run, pretraining.Course(run, data), told, hosts.Hosts())
    assert "is not finite" not in capfd.readouterr().err
    assert loop.train(run, pretraining.Course(run, data), found, hosts.Hosts())
    printed = capfd.readouterr().err
    assert f"step {bad + 1} is not finite: goes back to step 14, without batch {bad}" in printed
    assert "1 batches left out" in printed
    assert json.loads((found / "skipped_batches.json").read_text()) == [bad]
    assert numbers(found) == numbers(told)
    validation = [row for row in rows(found) if row.get("split") == "validation"]
    assert [row["skipped_batches"] for row in validation] == [1, 1]
    assert rows(found)[-1]["total_restart_seconds"] > 0
    # As if killed after it: from an older checkpoint on, the run is the same.
    for newer in (21, 25):
        shutil.rmtree(found / "checkpoints" / str(newer), ignore_errors=True)
    assert loop.train(run, pretraining.Course(run, data), found, hosts.Hosts())
    assert "is not finite" not in capfd.readouterr().err
    assert numbers(found) == numbers(told)


def test_a_run_that_stands_still_says_where_and_leaves(store, tmp_path, monkeypatch):
    workdir = tmp_path / "still"
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # no other test has compiled it
    began = time.monotonic()
    done = small_store.run_command(
        "train",
        *arguments(store, workdir),
        "--config.train.stall_minutes=0.001",  # shorter than the compiler takes
        expect=1,
    )
    assert time.monotonic() - began < 60
    assert "nothing has moved for 0.001 minutes (train.stall_minutes), in" in done.stderr
    assert 'loop.py", line' in (workdir / "stacks-0.txt").read_text()
    assert 'loop.py", line' in done.stderr


def test_stopped_while_it_compiles_or_evaluates_nothing_is_lost(undisturbed, store, tmp_path):
    workdir = tmp_path / "stopped"
    # The first signal comes while the compiler runs, the second with the evaluation of step 20.
    for line, printed in ((0, "stopped while compiling"), (20, "saved step 2")):
        process = subprocess.Popen(
            small_store.command("train", *arguments(store, workdir)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Loaded, it would not be caught.
            env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": str(line > 0)},
        )
        wait_for_lines(workdir, line, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
        assert process.returncode == 1, output
        assert f"SIGTERM: {printed}" in output.replace("there is ", "")
    small_store.run_here("train", *arguments(store, workdir))
    assert numbers(workdir) == numbers(undisturbed)


@pytest.mark.parametrize(
    ("profile", "code", "message"),
    [("4:3", 2, "START:END"), ("0:3", 2, "START:END"), ("x", 2, "START:END"), ("1:99", 1, "=40")],
)
def test_a_profile_that_cannot_be_is_refused(store, tmp_path, profile, code, message):
    done = small_store.run_here(
        "train", *arguments(store, tmp_path / "no"), f"--profile={profile}", expect=code
    )
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluate_counts_every_masked_word_once(undisturbed, tmp_path):
    figures = {}
    for batch_size in (16, 7):
        out = tmp_path / f"{batch_size}.json"
        small_store.run_here(
            "evaluate", f"--workdir={undisturbed}", f"--batch_size={batch_size}", f"--json={out}"
        )
        figures[batch_size] = json.loads(out.read_text())
    assert figures[16]["examples"] % 16  # there is a part-batch to get wrong
    for name, value in figures[16].items():
        assert figures[7][name] == pytest.approx(value, rel=1e-5), name


def test_fill_mask_answers_with_probabilities(undisturbed, tmp_path):
    carried = tmp_path / "carried"  # away from the store and its own old place
    shutil.copytree(undisturbed, carried)
    done = small_store.run_here(
        "predict", "fill-mask", f"--model={carried}", "--json", "--top_k=60",
        "The cat sees the [MASK] by the [MASK].", "A [MASK]"
    )  # fmt: skip
    two, one = (json.loads(line) for line in done.stdout.splitlines())
    assert [len(two["masks"]), len(one["masks"])] == [2, 1]
    for mask in two["masks"] + one["masks"]:
        shares = [guess["probability"] for guess in mask]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1.0, abs=1e-4)  # all 60 pieces of the vocabulary
    nothing = small_store.run_here(
        "predict", "fill-mask", f"--model={undisturbed}", "no mask here", expect=1
    )
    assert "no [MASK] in 'no mask here'" in nothing.stderr


def wait_for_lines(workdir: pathlib.Path, count: int, process: subprocess.Popen) -> None:
    path = workdir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
