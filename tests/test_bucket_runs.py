"""All in a bucket that fails now and then: prepare, train, kill, go on, evaluate, as on a disk."""

import importlib
import json
import os
import pathlib
import re
import signal
import subprocess
import time

import bucket as bucket_lib
import pytest
import small_store
import together

from albert_jax import storage
from albert_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLACE = f"gs://{bucket_lib.NAME}"
STEPS = 12  # saved after 5, 10 and 12
CONFIG = (
    f"--config={ROOT / 'configs' / 'tiny.py'}",
    f"--config.train.steps={STEPS}",
    "--config.train.global_batch_size=8",
    "--config.model.num_hidden_layers=1",
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=48",
    "--config.data.max_seq_length=32",
    "--config.data.max_predictions_per_seq=5",
    "--config.optimizer.warmup_steps=3",
    "--config.log.every_steps=1",
    "--config.eval.every_steps=12",
    "--config.eval.steps=2",
    "--config.checkpoint.every_steps=5",
)
TIMES = re.compile(r".*(seconds|_per_second|utilization)$|goodput$")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with bucket_lib.served() as served, pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("bucket")
        environment = {
            **served.environment,
            storage.CACHE: str(folder / "cache"),
            storage.PATIENCE: "60",
            # For the processes that train: one device, and a program that is compiled in half the
            # time.
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
        }
        for name, value in environment.items():
            patch.setenv(name, value)
        storage._files.cache_clear()
        yield served
        storage._files.cache_clear()


@pytest.fixture(autouse=True)
def sound(bucket):
    yield
    bucket.fault = lambda method, path: None


@pytest.fixture(scope="module")
def local_store(bucket, tmp_path_factory) -> pathlib.Path:
    return small_store.make(tmp_path_factory.mktemp("local"), documents=20)


@pytest.fixture(scope="module")
def local_run(local_store, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "local"
    small_store.run_command("train", *arguments(local_store, workdir))
    return workdir


@pytest.fixture(scope="module")
def store(bucket, local_store) -> str:
    """The same store, prepared from the bucket into the bucket."""
    text = local_store.parent / "text.txt"
    storage.upload(text, f"{PLACE}/texts/text.txt")
    small_store.run_here("prepare", *preparation(f"{PLACE}/store"))
    return f"{PLACE}/store"


def preparation(output: str) -> tuple[str, ...]:
    return (
        f"--input={PLACE}/texts/*.txt",
        f"--output={output}",
        "--train_tokenizer",
        "--vocab_size=60",
        "--validation_fraction=0.2",
        "--workers=1",
    )


def arguments(store: pathlib.Path | str, workdir: pathlib.Path | str) -> tuple[str, ...]:
    return (*CONFIG, f"--config.data.path={store}", f"--workdir={workdir}")


def numbers(text: str) -> list[dict]:
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if not TIMES.match(k)} for row in rows]


def lines(bucket, run: str) -> int:
    name = f"{run}/metrics.jsonl"
    return bucket.read(name).count(b"\n") if bucket.names(name) else 0


def whole_checkpoints(bucket, run: str) -> list[int]:
    found = [
        re.fullmatch(rf"{run}/checkpoints/(\d+)/commit_success.txt", n) for n in bucket.names()
    ]
    return sorted(int(one[1]) for one in found if one)


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        small_store.command(*command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until(process: subprocess.Popen, true) -> None:
    while not true():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def refusal(name: str, *arguments: str) -> str:
    """What a command says that refuses to work, without a process of its own."""
    with pytest.raises(UserError) as refused:
        importlib.import_module(f"albert_jax.{name}").main(arguments)
    return str(refused.value)


def test_a_store_in_a_bucket_is_the_one_on_a_disk(bucket, store, local_store):
    def content(read, names):
        return {name: read(name) for name in names if not name.startswith(("manifest", "."))}

    ours = content(
        lambda name: bucket.read(f"store/{name}"),
        [name.removeprefix("store/") for name in bucket.names("store/")],
    )
    files = {p.relative_to(local_store).as_posix(): p for p in local_store.rglob("*.*")}
    assert ours == content(lambda name: files[name].read_bytes(), files)
    assert f"{store} is a token store already" in refusal("prepare", *preparation(store))


def test_killed_on_the_bucket_and_answered_503_a_run_gives_the_numbers_of_a_disk(
    bucket, store, local_run
):
    run, second = f"{PLACE}/runs/killed", "runs/killed/checkpoints/10/"
    # It is killed in the middle of its second save, of which a part is in the bucket.
    bucket.fault = lambda method, path: (
        60.0 if second in path and len(bucket.names(second)) > 1 else None
    )
    process = start("train", *arguments(store, run))
    wait_until(process, lambda: len(bucket.names(second)) > 1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert whole_checkpoints(bucket, "runs/killed") == [5]
    assert lines(bucket, "runs/killed") >= 5  # of each step up to it, whatever killed the run
    # It goes on, and in the middle of the same save the bucket answers nothing for ten seconds.
    began = []

    def down(method: str, path: str) -> int | None:
        began.extend([time.monotonic()] if second in path and method == "POST" else [])
        return 503 if began and time.monotonic() < began[0] + 10.0 else None

    bucket.fault = down
    process = start("train", *arguments(store, run))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert began
    assert "answers again" in output
    assert "Traceback" not in output
    assert numbers(bucket.read("runs/killed/metrics.jsonl").decode()) == numbers(
        (local_run / "metrics.jsonl").read_text()
    )
    left = {name.split("/")[2] for name in bucket.names("runs/killed/")}
    assert {"config.json", "tokenizer.model", "report", "tensorboard", "checkpoints"} <= left
    assert ".lock" not in left
    evaluated = small_store.run_here("evaluate", f"--workdir={run}", "--json=-")
    reference = small_store.run_here("evaluate", f"--workdir={local_run}", "--json=-")
    assert json.loads(evaluated.stdout) == json.loads(reference.stdout)
    filled = small_store.run_here(
        "predict", "fill-mask", f"--model={run}", "--json", "The cat sees the [MASK]."
    )
    assert json.loads(filled.stdout)["masks"]


def test_fine_tuning_from_the_bucket_into_the_bucket_is_that_of_a_disk(bucket, local_run, tmp_path):
    table = tmp_path / "table"
    table.mkdir()
    for name, seed in (("train", 1), ("validation", 2)):
        rows = [f"{text},{text.split()[-1]}" for text in small_store.sentences(seed, 24)]
        (table / f"{name}.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
        storage.upload(table / f"{name}.csv", f"{PLACE}/table/{name}.csv")
    storage.write(f"{PLACE}/new.txt", b"The cat sees the dog near the bridge.\n")
    storage.write(f"{PLACE}/table/far/away.bin", b"of no use")
    start = f"{PLACE}/models/start"
    small_store.run_here("convert", f"--model={local_run}", "--to=albert_jax", f"--output={start}")

    def finetune(init, data, workdir, *more: str) -> str:
        config = ROOT / "configs" / "table.py"
        own = ("--config.train.epochs=1", "--config.train.global_batch_size=8")
        where = (f"--config={config}", f"--init={init}", f"--data={data}", f"--workdir={workdir}")
        return small_store.run_here("finetune", *where, *own, *more).stdout

    bucket.requests.clear()
    far = f"{PLACE}/runs/tuned"
    said = finetune(start, f"{PLACE}/table/train.csv", far, "--seeds=2")
    assert f"starts from {start};" in said
    assert not any("away.bin" in path and "alt=media" in path for _, path in bucket.requests)
    near = tmp_path / "tuned"
    finetune(local_run, table / "train.csv", near)
    ours = bucket.read("runs/tuned/seed_0/metrics.jsonl").decode()
    assert numbers(ours) == numbers((near / "metrics.jsonl").read_text())
    name = "predictions/predictions_validation.tsv"
    assert bucket.read(f"runs/tuned/seed_0/{name}") == (near / name).read_bytes()
    assert {"summary.json", "summary.png"} <= {n.split("/")[2] for n in bucket.names("runs/tuned/")}

    figures = f"{PLACE}/figures.json"
    small_store.run_here("evaluate", f"--workdir={far}/seed_0", f"--json={figures}")
    assert json.loads(storage.read(figures)) == json.loads(
        small_store.run_here("evaluate", f"--workdir={near}", "--json=-").stdout
    )
    text = f"--input={PLACE}/new.txt"
    answers = [
        small_store.run_here("predict", "classify", f"--model={model}", "--json", text).stdout
        for model in (f"{far}/seed_0", near)
    ]
    assert answers[0] == answers[1]


def test_two_processes_train_on_the_bucket_and_go_on_after_a_kill(
    bucket, store, local_run, tmp_path
):
    run = f"{PLACE}/runs/two"
    both = [small_store.command("train", *arguments(store, run), "--config.mesh.data=2")] * 2

    def saved(_: together.Run) -> bool:
        return lines(bucket, "runs/two") >= 5 and bool(whole_checkpoints(bucket, "runs/two"))

    first = together.start_until(saved, tmp_path / "first", both)
    first.processes[0].kill()
    assert first.wait(60) == [-signal.SIGKILL, 1], first.logs()
    # Whatever noticed it first, a library or we.
    assert "the last checkpoint is" in first.log(1), first.logs()
    assert "Traceback" not in first.log(1)
    kept = whole_checkpoints(bucket, "runs/two")
    assert kept[-1] < STEPS
    second = together.start_until(together.Run.done, tmp_path / "second", both)
    assert f"step {kept[-1]}" in second.log(0), second.logs()
    ours = numbers(bucket.read("runs/two/metrics.jsonl").decode())
    theirs = numbers((local_run / "metrics.jsonl").read_text())
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.pop("split", "") == other.pop("split", "")
        assert mine == pytest.approx(other, rel=1e-4)
    assert ".lock" not in {name.split("/")[2] for name in bucket.names("runs/two/")}


def test_a_bucket_that_goes_away_in_the_middle_of_a_save_leaves_the_last_checkpoint(
    bucket, store, local_run, monkeypatch
):
    monkeypatch.setenv(storage.PATIENCE, "3")
    run = f"{PLACE}/runs/lost"
    second = "runs/lost/checkpoints/10/"

    def gone(method: str, path: str) -> int | None:
        lost.extend([path] if second in path and method != "GET" else [])
        return 503 if lost else None

    lost: list[str] = []
    bucket.fault = gone
    done = small_store.run_command("train", *arguments(store, run), expect=1)
    assert re.search(r"error: .*gs://test-bucket", done.stderr), done.stderr
    assert "The last good one is of step 5; the same command again goes on." in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    bucket.fault = lambda method, path: None
    assert whole_checkpoints(bucket, "runs/lost") == [5]
    monkeypatch.setenv(storage.PATIENCE, "60")
    small_store.run_command("train", *arguments(store, run))
    assert numbers(bucket.read("runs/lost/metrics.jsonl").decode()) == numbers(
        (local_run / "metrics.jsonl").read_text()
    )


def test_a_damaged_or_missing_shard_and_an_unreadable_store_are_named(bucket, store, tmp_path):
    from albert_jax.data import store as store_lib

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(storage.CACHE, str(tmp_path))
        name = "store/train/00000-of-00001.tokens.npy"
        content = bucket.read(name)
        opened = store_lib.open_store(store, whole=False)
        assert not list(tmp_path.rglob("*.npy"))
        storage.write(f"{PLACE}/{name}", content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{PLACE}/{name} is damaged: its SHA-256 begins"):
            opened.fetch("train", 0)
        storage.delete(f"{PLACE}/{name}")
        with pytest.raises(UserError, match=f"{PLACE}/{name} is missing"):
            store_lib.open_store(store)
        storage.write(f"{PLACE}/{name}", content)
        shard = opened.fetch("train", 0)
        opened.drop("train", 0)
        assert not list(tmp_path.rglob("train/*.npy"))
        assert shard.tokens.sum() > 0  # who has it keeps it
        bucket.fault = lambda method, path: 403
        with pytest.raises(UserError, match="may not be reached with the account"):
            store_lib.open_store(store)
        bucket.fault = lambda method, path: None
        with pytest.raises(UserError, match=f"no token store {PLACE}/none"):
            store_lib.open_store(f"{PLACE}/none")


def test_copying_goes_on_where_it_was_killed(bucket, store, tmp_path):
    from albert_jax.data import store as store_lib

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(storage.CACHE, str(tmp_path))
        bucket.fault = lambda method, path: 404 if "validation" in path else None
        with pytest.raises(Exception, match="is missing"):
            store_lib.open_store(store)
        bucket.fault = lambda method, path: None
        bucket.requests.clear()
        store_lib.open_store(store)
        assert not any("tokenizer.model" in path for _, path in bucket.requests)
        again = [path for _, path in bucket.requests if "train" in path]
        assert not again, "what was copied is not copied again"


def test_a_run_in_a_bucket_has_one_writer(bucket, store, local_run):
    place = f"{PLACE}/runs/taken"
    with storage.Claim(f"{place}/.lock", "{}"):
        done = small_store.run_command("train", *arguments(store, place), expect=1)
    assert f"--workdir={place}: process {os.getpid()} of" in done.stderr
    assert "is training there" in done.stderr


def test_an_upload_that_breaks_off_is_no_store_and_goes_on(bucket, store, monkeypatch):
    output = f"{PLACE}/again"
    monkeypatch.setenv(storage.PATIENCE, "2")
    sent = []

    def gone(method: str, path: str) -> int | None:
        if "upload" in path and "name=again" not in path and len(bucket.names("again/")) > 3:
            sent.append(path)
        return 503 if sent else None

    bucket.fault = gone
    done = small_store.run_command("prepare", *preparation(output), expect=1)
    assert "the same command with --resume copies what is missing" in done.stderr
    assert "Traceback" not in done.stderr
    bucket.fault = lambda method, path: None
    refused = refusal("train", *arguments(output, f"{PLACE}/runs/x"))
    assert f"no token store {output} (no manifest.json there)" in refused
    monkeypatch.setenv(storage.PATIENCE, "20")
    small_store.run_here("prepare", *preparation(output), "--resume")
    for name in bucket.names("store/"):
        if not name.endswith("manifest.json"):
            assert bucket.read(name.replace("store/", "again/")) == bucket.read(name)
