"""Shards by Apache Beam: the same store as by our own processes, also when it was killed half-way,
and the same messages. Beam's runner on this machine stands for those on many.
"""

import contextlib
import hashlib
import importlib.util
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest

from albert_jax import prepare
from albert_jax.data import store
from albert_jax.errors import UserError

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="Beam is not installed: pip install 'albert-jax[beam]'",
)
NOVELS = 8


@pytest.fixture(scope="module")
def flags(shared_data) -> list[str]:
    """What to prepare: novels enough for several shards."""
    novels = sorted((shared_data / "corpus" / "en_novels").glob("*.txt"))[:NOVELS]
    model = shared_data / "tokenizer" / "spiece.model"
    return [f"--input={','.join(map(str, novels))}", "--document=file", f"--tokenizer={model}"]


@pytest.fixture(scope="module")
def local(flags, tmp_path_factory) -> dict[str, str]:
    """Hashes of the store that our own processes make."""
    output = tmp_path_factory.mktemp("local") / "store"
    prepare.main([*flags, f"--output={output}", "--workers=1"])
    return hashes(output)


def hashes(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "albert_jax.prepare", *arguments]


@contextlib.contextmanager
def stopped_half_way(number: signal.Signals, flags: list[str], output: pathlib.Path):
    """Starts a job and sends it a signal when its first shards are finished."""
    with subprocess.Popen(
        command(*flags, f"--output={output}", "--runner=DirectRunner"),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + 60
        while not finished(output):
            assert process.poll() is None, "it ended before"
            assert time.monotonic() < end, "nothing was finished"
            time.sleep(0.02)
        process.send_signal(number)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
        yield process.returncode, errors, time.monotonic() - began


def finished(output: pathlib.Path) -> list[pathlib.Path]:
    return sorted(output.with_name(output.name + ".unfinished").glob("*-of-*.json"))


@needs_beam
def test_beam_writes_the_store_that_our_own_processes_write(flags, local, tmp_path):
    prepare.main([*flags, f"--output={tmp_path}/store", "--runner=DirectRunner"])
    assert hashes(tmp_path / "store") == local
    assert len(store.open_store(tmp_path / "store").split("train")) > 2


@needs_beam
@pytest.mark.parametrize(
    ("number", "runner"), [(signal.SIGKILL, ["--runner=DirectRunner"]), (signal.SIGINT, [])]
)
def test_a_job_that_was_stopped_half_way_is_finished_by_beam_or_without_it(
    number, runner, flags, local, tmp_path
):
    output = tmp_path / "store"
    with stopped_half_way(number, flags, output) as (code, errors, seconds):
        assert code != 0
        assert seconds < 15
    if number == signal.SIGINT:
        assert "--resume" in errors
        assert "Traceback" not in errors
    assert not output.exists()
    shards = output.with_name("store.unfinished") / "train"
    kept = shards / f"{finished(output)[0].stem}.tokens.npy"
    before = kept.stat().st_mtime_ns
    prepare.main([*flags, f"--output={output}", "--resume", "--workers=1", *runner])
    assert hashes(output) == local
    assert (output / "train" / kept.name).stat().st_mtime_ns == before


@needs_beam
def test_what_repeats_is_found_on_many_machines_as_on_one(flags, tmp_path):
    novels = flags[0].removeprefix("--input=").split(",")[:2]
    copy = tmp_path / "copy.txt"
    copy.write_bytes(pathlib.Path(novels[0]).read_bytes())
    quality = ["--unique_documents", "--unique_paragraphs"]
    given = [f"--input={','.join([*novels, str(copy)])}", *flags[1:], *quality, "--workers=1"]
    prepare.main([*given, f"--output={tmp_path}/local"])
    prepare.main([*given, f"--output={tmp_path}/beam", "--runner=DirectRunner"])
    assert hashes(tmp_path / "beam") == hashes(tmp_path / "local")
    skipped = store.open_store(tmp_path / "beam").manifest["skipped"]
    assert skipped["documents like an earlier one"]["count"] == 1


@needs_beam
def test_bad_input_is_named_as_without_beam_and_the_other_shards_are_kept(flags, tmp_path):
    bad = tmp_path / "bad.txt"
    few = ",".join(flags[0].split(",")[:3])
    bad.write_bytes(b"A good line.\nA bad \xff one.\n")
    done = subprocess.run(
        command(f"{few},{bad}", *flags[1:], f"--output={tmp_path}/store", "--runner=DirectRunner"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"error: {bad}, line 2 (byte 19): invalid UTF-8: 0xff." in done.stderr
    assert "Traceback" not in done.stderr
    assert finished(tmp_path / "store")


@needs_beam
def test_a_full_disk_of_a_worker_is_one_message(flags, tmp_path):
    small = 800_000  # bytes: the tokenizer fits, the tokens of the first shard do not

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, small))

    texts = tmp_path / "long.txt"
    novels = flags[0].removeprefix("--input=").split(",")
    texts.write_bytes(b"\n".join(pathlib.Path(path).read_bytes() for path in novels))
    done = subprocess.run(
        command(
            f"--input={texts}", *flags[1:], f"--output={tmp_path}/store", "--runner=DirectRunner"
        ),
        capture_output=True,
        text=True,
        preexec_fn=small_files,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "disk is full" in done.stderr
    assert "Traceback" not in done.stderr


def test_dataflow_wants_a_bucket(flags, tmp_path):
    with pytest.raises(UserError, match=r"--input=.* workers of Dataflow do not see it.*gs://"):
        prepare.main([*flags, f"--output={tmp_path}/store", "--runner=DataflowRunner"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is not None, reason="Beam is installed here"
)
def test_without_the_extra_one_line_says_what_to_install(flags, tmp_path):
    done = subprocess.run(
        command(*flags, f"--output={tmp_path}/store", "--runner=DirectRunner"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: --runner=DirectRunner needs apache_beam: pip install 'albert-jax[beam]'"
    ]
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_beam_is_imported_without_a_runner(flags, tmp_path):
    script = (
        "import sys; from albert_jax import prepare; prepare.main(sys.argv[1:]);"
        "sys.exit(any(name.startswith('apache_beam') for name in sys.modules))"
    )
    one = f"{flags[0].split(',')[0]}"
    subprocess.run(
        [sys.executable, "-c", script, one, *flags[1:], f"--output={tmp_path}/store"],
        check=True,
        capture_output=True,
    )
