"""The command, end to end: what it writes, whoever writes it and however it was interrupted, and
what it refuses."""

import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import sentencepiece
import sentencex

from albert_jax import prepare
from albert_jax.data import store, tokenizer
from albert_jax.errors import UserError

segment = sentencex.segment  # pyright: ignore[reportAttributeAccessIssue]

WORDS = ["river", "stone", "walks", "slowly", "under", "heavy", "clouds", "while", "seven", "quiet"]
WORDS += [
    "birds",
    "follow",
    "our",
    "small",
    "boat",
    "towards",
    "distant",
    "hills",
    "where",
    "nobody",
]
WORDS += ["counted", "days", "or", "asked", "questions", "about", "winter"]


reads_proc = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="looks at processes and limits as Linux has them"
)


def sentence(rng: random.Random) -> str:
    words = rng.choices(WORDS, k=rng.randint(3, 17))
    return " ".join(words).capitalize() + rng.choice(".!?")


def document(rng: random.Random, sentences: int) -> str:
    """Sentences, one to three a line, no blank line."""
    lines = []
    while sentences > 0:
        take = min(sentences, rng.randint(1, 3))
        lines.append(" ".join(sentence(rng) for _ in range(take)))
        sentences -= take
    return "\n".join(lines)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    return tokenizer.train((sentence(rng) for _ in range(900)), path, 60, tokenizer.Normalization())


@pytest.fixture
def corpus(tmp_path):
    """Three files of some 40 documents each."""
    rng = random.Random(2)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b", "c"):
        documents = [document(rng, rng.randint(2, 31)) for _ in range(rng.randint(37, 43))]
        (folder / f"{name}.txt").write_text("\n\n".join(documents) + "\n")
    return folder


def run(*arguments, limit=None, **popen):
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "albert_jax.prepare", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
        **popen,
    )


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def stored_documents(made: store.Store, split: str) -> list[list[tuple[int, ...]]]:
    documents = []
    for shard in made.split(split):
        sentences = [
            tuple(shard.tokens[a:b].tolist())
            for a, b in zip(shard.sentences, shard.sentences[1:], strict=False)
        ]
        documents += [
            sentences[a:b] for a, b in zip(shard.documents, shard.documents[1:], strict=False)
        ]
    return documents


def big_input(path: pathlib.Path, megabytes: int) -> pathlib.Path:
    """Enough text to be caught in the middle of it."""
    rng = random.Random(3)
    block = "\n\n".join(document(rng, 20) for _ in range(700)) + "\n\n"
    path.write_text(block * math.ceil(megabytes * 1e6 / len(block)))
    return path


@contextlib.contextmanager
def started(*arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "albert_jax.prepare", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def finished_shards(output: pathlib.Path) -> list[pathlib.Path]:
    return sorted(output.with_name(output.name + ".unfinished").glob("*-of-*.json"))


def children(pid: int) -> list[int]:
    """Worker processes below a process, by what the system says."""
    found = []
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
    return found


def test_a_store_holds_every_sentence_of_the_text_in_its_document(corpus, model, tmp_path):
    prepare.main(
        [
            f"--input={corpus}/*.txt",
            f"--tokenizer={model}",
            f"--output={tmp_path / 'store'}",
            "--workers=1",
        ]
    )
    made = store.open_store(tmp_path / "store")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = [
        [
            tuple(processor.encode(sentence.strip().lower()))
            for line in written.split("\n")
            for sentence in segment("en", line)
        ]
        for path in sorted(corpus.glob("*.txt"))
        for written in path.read_text().strip().split("\n\n")
    ]
    train, held_out = (stored_documents(made, split) for split in store.SPLITS)
    assert train
    assert held_out
    # The order of documents is kept, so what is in neither order is in neither split.
    assert [found for found in expected if found in train] == train
    assert [found for found in expected if found in held_out] == held_out
    assert len(train) + len(held_out) == len(expected)


def test_the_manifest_counts_what_is_there(corpus, model, tmp_path):
    prepare.main(
        [
            f"--input={corpus}/*.txt",
            f"--tokenizer={model}",
            f"--output={tmp_path / 'store'}",
            "--workers=1",
        ]
    )
    made = store.open_store(tmp_path / "store")
    counts = {}
    for split in store.SPLITS:
        documents = stored_documents(made, split)
        written = made.manifest["splits"][split]
        assert written["documents"] == len(documents)
        assert written["sentences"] == sum(map(len, documents))
        counts[split] = Counter(
            id_ for found in documents for sentence in found for id_ in sentence
        )
        assert written["tokens"] == counts[split].total()
        for shard in written["shards"]:
            for array, digest in shard["sha256"].items():
                path = tmp_path / "store" / split / f"{shard['name']}.{array}.npy"
                assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    train, held_out = counts["train"], counts["validation"]
    nats = sum(
        count * -math.log((train[token_id] + 1) / (train.total() + made.vocab_size))
        for token_id, count in held_out.items()
    )
    assert made.unigram_loss == pytest.approx(nats / held_out.total(), rel=1e-12)


def test_the_bytes_do_not_depend_on_the_number_of_workers(model, tmp_path):
    big_input(tmp_path / "text.txt", 4)
    for workers in (1, 2, 3):
        result = run(
            f"--input={tmp_path}/text.txt",
            f"--tokenizer={model}",
            f"--output={tmp_path}/{workers}",
            f"--workers={workers}",
        )
        assert result.returncode == 0, result.stderr
    one = contents(tmp_path / "1")
    assert len(store.open_store(tmp_path / "1").split("train")) > 3
    assert contents(tmp_path / "2") == one
    assert contents(tmp_path / "3") == one


def test_both_splits_hold_something_of_the_smallest_input_that_can_be_parted(model, tmp_path):
    rng = random.Random(5)
    # Of eight pairs some fall whole into one split, and some whole into the other.
    for pair, fraction in itertools.product(range(8), (0.001, 0.5)):
        for index in range(2):
            (tmp_path / f"{index}.txt").write_text(document(rng, 6))
        out = tmp_path / f"store{pair}-{fraction}"
        prepare.main(
            [
                f"--input={tmp_path}/*.txt",
                f"--tokenizer={model}",
                f"--output={out}",
                f"--validation_fraction={fraction}",
            ]
        )
        splits = store.open_store(out).manifest["splits"]
        assert splits["train"]["documents"] == splits["validation"]["documents"] == 1


def test_a_document_keeps_its_split_when_others_join_it(corpus, model, tmp_path):
    rng = random.Random(6)
    flags = [f"--tokenizer={model}", "--validation_fraction=0.3", "--workers=1"]
    prepare.main([f"--input={corpus}/a.txt", f"--output={tmp_path / 'few'}", *flags])
    (corpus / "0.txt").write_text("\n\n".join(document(rng, 9) for _ in range(50)))
    prepare.main([f"--input={corpus}/*.txt", f"--output={tmp_path / 'more'}", *flags])
    few, more = store.open_store(tmp_path / "few"), store.open_store(tmp_path / "more")
    for split in store.SPLITS:
        assert stored_documents(few, split)
        later = stored_documents(more, split)
        assert all(found in later for found in stored_documents(few, split))
    assert few.fingerprint != more.fingerprint


def test_a_held_out_stretch_of_a_long_document_leaves_two_documents_not_a_seam(model, tmp_path):
    rng = random.Random(7)
    (tmp_path / "long.txt").write_text(document(rng, 3000))
    prepare.main(
        [
            f"--input={tmp_path}/long.txt",
            f"--tokenizer={model}",
            f"--output={tmp_path}/store",
            "--validation_fraction=0.4",
        ]
    )
    made = store.open_store(tmp_path / "store")
    train, held_out = (stored_documents(made, split) for split in store.SPLITS)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    whole = [
        tuple(processor.encode(found.strip().lower()))
        for line in (tmp_path / "long.txt").read_text().split("\n")
        for found in segment("en", line)
    ]
    assert sum(map(len, train + held_out)) == len(whole)
    assert len(held_out) > 1
    for part in train + held_out:
        place = whole.index(part[0])
        starts = [i for i in range(len(whole)) if whole[i : i + len(part)] == part]
        assert starts, f"no stretch of the document, from sentence {place}"


@reads_proc
def test_a_killed_run_goes_on_to_the_same_bytes(model, tmp_path):
    text = big_input(tmp_path / "text.txt", 12)
    flags = [f"--input={text}", f"--tokenizer={model}", "--workers=2"]
    assert run(*flags, f"--output={tmp_path}/whole").returncode == 0
    output = tmp_path / "store"
    with started(*flags, f"--output={output}") as process:
        wait_for(lambda: len(finished_shards(output)) >= 3)
        workers = children(process.pid)
        process.kill()
        process.wait()
        # Workers do not outlive their parent.
        wait_for(
            lambda: not any(pathlib.Path(f"/proc/{worker}").exists() for worker in workers), 10
        )
    assert not output.exists()
    with pytest.raises(UserError, match="--resume"):
        store.open_store(output)
    refused = run(*flags, f"--output={output}")
    assert refused.returncode == 1
    assert "--resume" in refused.stderr
    kept = {path.name: path.stat().st_mtime_ns for path in finished_shards(output)}
    first = min(kept).removesuffix(".json")
    tokens = output.with_name("store.unfinished") / "train" / f"{first}.tokens.npy"
    before = tokens.stat().st_mtime_ns
    resumed = run(*flags, f"--output={output}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert contents(output) == contents(tmp_path / "whole")
    assert (output / "train" / tokens.name).stat().st_mtime_ns == before


def test_resume_does_again_what_was_harmed_or_changed_and_refuses_other_options(model, tmp_path):
    rng = random.Random(8)
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    for path in paths:
        path.write_text("\n\n".join(document(rng, 30) for _ in range(900)))
    flags = [f"--input={tmp_path}/*.txt", f"--tokenizer={model}", f"--output={tmp_path}/store"]
    good = paths[2].read_bytes()
    paths[2].write_bytes(good + b"\n\nbroken \xff here\n")
    stopped = run(*flags, "--workers=1")
    assert stopped.returncode == 1
    unfinished = tmp_path / "store.unfinished"
    assert len(list(unfinished.glob("*-of-*.json"))) >= 2
    other = run(*flags, "--resume", "--cased")
    assert other.returncode == 1
    assert "lower_case: True there, False now" in other.stderr
    paths[2].write_bytes(good)
    changed = paths[0].read_bytes()
    paths[0].write_bytes(changed.replace(b"river", b"water"))
    harmed = sorted((unfinished / "train").glob("*.tokens.npy"))[1]
    harmed.write_bytes(harmed.read_bytes()[:-2] + b"\x07\x00")
    assert run(*flags, "--resume").returncode == 0
    assert run(*flags[:2], f"--output={tmp_path}/whole").returncode == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


@reads_proc
def test_ctrl_c_while_workers_start_is_as_quiet(model, tmp_path):
    text = big_input(tmp_path / "text.txt", 30)
    output = tmp_path / "store"
    with started(
        f"--input={text}", f"--tokenizer={model}", f"--output={output}", "--workers=2"
    ) as process:
        wait_for(lambda: len(children(process.pid)) == 2)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert not output.exists()


@reads_proc
def test_ctrl_c_ends_it_soon_and_says_how_to_go_on(model, tmp_path):
    text = big_input(tmp_path / "text.txt", 30)
    output = tmp_path / "store"
    with started(
        f"--input={text}", f"--tokenizer={model}", f"--output={output}", "--workers=2"
    ) as process:
        wait_for(lambda: len(finished_shards(output)) >= 1)
        workers = children(process.pid)
        assert workers
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, errors = process.communicate(timeout=20)
        assert time.monotonic() - began < 5
        assert process.returncode == 1
        assert "--resume" in errors
        assert "Traceback" not in errors
        assert not any(pathlib.Path(f"/proc/{worker}").exists() for worker in workers)
    assert not output.exists()


@reads_proc
def test_a_worker_that_the_system_kills_is_reported(model, tmp_path):
    text = big_input(tmp_path / "text.txt", 30)
    output = tmp_path / "store"
    with started(
        f"--input={text}", f"--tokenizer={model}", f"--output={output}", "--workers=2"
    ) as process:
        wait_for(lambda: len(finished_shards(output)) >= 1)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "a worker process was killed" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_message_and_no_store(workers, model, tmp_path):
    text = big_input(tmp_path / "text.txt", 3)
    flags = [f"--input={text}", f"--tokenizer={model}", f"--workers={workers}"]

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    result = run(*flags, f"--output={tmp_path}/store", limit=small_files)
    assert result.returncode == 1
    assert "disk is full" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "store").exists()
    assert run(*flags, f"--output={tmp_path}/store", "--resume").returncode == 0
    assert run(*flags, f"--output={tmp_path}/other").returncode == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


def test_resume_trains_the_vocabulary_again_if_the_text_is_another(tmp_path):
    rng = random.Random(10)
    for name, sentences in (("a", 21_000), ("b", 42_000)):
        (tmp_path / f"{name}.txt").write_text(document(rng, sentences))
    flags = [f"--input={tmp_path}/*.txt", "--train_tokenizer", "--vocab_size=60", "--document=file"]

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))

    stopped = run(*flags, f"--output={tmp_path}/store", "--workers=1", limit=small_files)
    assert stopped.returncode == 1
    assert len(finished_shards(tmp_path / "store")) == 1
    text = tmp_path / "b.txt"
    text.write_text(text.read_text().replace("clouds", "quartz").replace("nobody", "zebras"))
    assert run(*flags, f"--output={tmp_path}/store", "--resume").returncode == 0
    assert run(*flags, f"--output={tmp_path}/other").returncode == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


def test_a_second_writer_and_a_reader_while_one_works_are_refused(model, tmp_path):
    text = big_input(tmp_path / "text.txt", 12)
    flags = [f"--input={text}", f"--tokenizer={model}", f"--output={tmp_path}/store"]
    with started(*flags, "--workers=1") as first:
        wait_for((tmp_path / "store.unfinished" / "options.json").exists)
        first.send_signal(signal.SIGSTOP)  # or it may be done before the others have started
        for more in ([], ["--resume"]):
            second = run(*flags, *more)
            assert second.returncode == 1
            assert "another albert_jax.prepare is writing" in second.stderr
            assert f"(process {first.pid} of " in second.stderr
        with pytest.raises(UserError, match=f"is being written by process {first.pid} of "):
            store.open_store(tmp_path / "store")
        first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 0
    assert run(*flags[:2], f"--output={tmp_path}/other").returncode == 0
    assert contents(tmp_path / "store") == contents(tmp_path / "other")


def test_an_output_that_holds_something_is_left_alone(corpus, model, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    for output in (taken, taken / "thesis.tex"):
        with pytest.raises(UserError, match="holds something else"):
            prepare.main([f"--input={corpus}/*.txt", f"--tokenizer={model}", f"--output={output}"])
    assert contents(taken) == {"thesis.tex": b"years of work"}
    (tmp_path / "store.unfinished").mkdir()
    (tmp_path / "store.unfinished" / "thesis.tex").write_text("more work")
    with pytest.raises(UserError, match="holds something else"):
        prepare.main(
            [f"--input={corpus}/*.txt", f"--tokenizer={model}", f"--output={tmp_path}/store"]
        )
    assert contents(tmp_path / "store.unfinished") == {"thesis.tex": b"more work"}


def test_a_store_is_never_written_over(corpus, model, tmp_path):
    flags = [f"--input={corpus}/*.txt", f"--tokenizer={model}", f"--output={tmp_path}/store"]
    prepare.main(flags)
    before = contents(tmp_path / "store")
    with pytest.raises(UserError, match="is a token store already"):
        prepare.main(flags)
    assert contents(tmp_path / "store") == before


GOOD = "This is a good text. It has two sentences and it is fine."

BAD = {
    "invalid UTF-8": (
        "x.txt",
        f"{GOOD}\n\ncaf".encode() + b"\xe9 au lait\n",
        r"x.txt, line 3 \(byte 62\): invalid UTF-8: 0xe9",
    ),
    "UTF-16": ("x.txt", GOOD.encode("utf-16"), "UTF-16"),
    "NUL": ("x.txt", f"{GOOD}\nab\0c\n".encode(), r"line 2 \(byte 60\): a NUL"),
    "control": (
        "x.txt",
        f"{GOOD}\n\n\x07\n".encode(),
        r"line 3 \(byte 59\): control character U\+0007",
    ),
    "a line of 20 MB": ("x.txt", b"a" * 20_000_000, "line of over 16 MiB"),
    "empty file": ("x.txt", b"", "0 bytes each .*x.txt"),
    "white space": ("x.txt", b" \n\n\t\n", "nothing to train on"),
    "one word a document": (
        "x.txt",
        b"one\n\ntwo\n\nthree\n",
        "nothing to train on.*3 documents of one word",
    ),
    "not JSON": ("x.jsonl", b'{"text": "Fine."}\n{"text": \n', r"line 2 \(byte 18\): not JSON"),
    "JSON array": ("x.jsonl", b"[1, 2]\n", "JSON list"),
    "no field": (
        "x.jsonl",
        b'{"body": "Fine.", "id": 3}\n',
        "without the field text .it has: body, id",
    ),
    "no string": ("x.jsonl", b'{"text": 7}\n', "text is int"),
    "half a pair": ("x.jsonl", b'{"text": "a \\ud800 b"}\n', "surrogate"),
    "NUL in JSON": ("x.jsonl", b'{"text": "a \\u0000 b"}\n', "NUL"),
    "no gzip": ("x.txt.gz", GOOD.encode(), "damaged .gz"),
    "half a gzip": ("x.txt.gz", gzip.compress(GOOD.encode() * 99)[:-9], "damaged .gz"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_no_store(case, model, tmp_path):
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare.main(
            [f"--input={tmp_path / name}", f"--tokenizer={model}", f"--output={tmp_path}/store"]
        )
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "case", [case for case in BAD if "empty" not in case and "white" not in case]
)
def test_bad_input_can_be_skipped_and_is_counted(case, model, tmp_path, capsys):
    name, content, _ = BAD[case]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text(f"{GOOD}\n\n{GOOD} It is not the other one.\n")
    prepare.main(
        [
            f"--input={tmp_path / name},{tmp_path}/good.txt",
            f"--tokenizer={model}",
            f"--output={tmp_path}/store",
            "--errors=skip",
        ]
    )
    made = store.open_store(tmp_path / "store")
    assert sum(skip["count"] for skip in made.manifest["skipped"].values()) >= 1
    assert name in json.dumps(made.manifest["skipped"])
    assert "left out or cut: " in capsys.readouterr().out
    stored = [found for split in store.SPLITS for found in stored_documents(made, split)]
    assert [len(found) for found in stored].count(3) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input=nowhere/*.txt"], "names no file"),
        (["--input=."], "is a folder"),
        (["--input="], "names nothing"),
        (["--tokenizer=nowhere.model"], "cannot be read"),
        (["--workers=0"], "--workers=0"),
        (["--language=english"], "not a language code"),
        (["--validation_fraction=1.5"], "between 0 and 0.5"),
    ],
)
def test_impossible_flags_are_refused_before_anything_is_written(
    flags, message, corpus, model, tmp_path
):
    given = {"--input": f"{corpus}/*.txt", "--tokenizer": model, "--output": tmp_path / "store"}
    given |= dict(flag.split("=", 1) for flag in flags)
    with pytest.raises(UserError, match=message):
        prepare.main([f"{name}={value}" for name, value in given.items()])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_tokenizer=wordpiece", "--compatible_with=huggingface"], "is for SentencePiece"),
        (["--tokenizer=roberta.json", "--cased"], "says itself what --cased"),
        (["--tokenizer=x.model", "--vocab_size=9"], "--tokenizer has its own size"),
        (["--train_tokenizer=words"], "invalid choice: 'words'"),
    ],
)
def test_flags_that_contradict_each_other_are_a_wrong_command_line(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.main(["--input=a.txt", "--output=store", *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@reads_proc
def test_a_vocabulary_is_trained_the_same_whoever_trains_it(corpus, tmp_path):
    flags = [f"--input={corpus}/*.txt", "--train_tokenizer", "--vocab_size=50"]
    for cores in (1, 2):
        allowed = functools.partial(os.sched_setaffinity, 0, range(cores))
        result = run(*flags, f"--output={tmp_path}/{cores}", limit=allowed)
        assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert store.open_store(tmp_path / "1").tokenizer().vocab_size == 50


def test_a_vocabulary_too_large_for_the_text_names_the_largest(corpus, tmp_path):
    flags = [f"--input={corpus}/*.txt", "--train_tokenizer", f"--output={tmp_path}/store"]
    with pytest.raises(UserError, match="the largest it can fill is") as caught:
        prepare.main([*flags, "--vocab_size=9999"])
    largest = int(str(caught.value).partition("can fill is ")[2].partition(".")[0])
    prepare.main([*flags, f"--vocab_size={largest}"])
    assert store.open_store(tmp_path / "store").vocab_size == largest


@reads_proc
def test_memory_does_not_grow_with_the_input(model, tmp_path):
    """One packed file without a single blank line: one document, of which a part is held at a
    time."""
    rng = random.Random(9)
    block = (document(rng, 20_000) + "\n").encode()
    peaks = []
    for copies in (8, 32):
        path = tmp_path / f"{copies}.txt.gz"
        with gzip.GzipFile(path, "wb", compresslevel=1) as file:
            for _ in range(copies):
                file.write(block)
        script = (
            "import sys; from albert_jax import prepare; prepare.main(sys.argv[1:]);"
            # Not getrusage: before the exec this process was a copy of the tests'.
            "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
        )
        flags = [
            f"--input={path}",
            f"--tokenizer={model}",
            f"--output={tmp_path}/{copies}",
            "--workers=1",
        ]
        result = subprocess.run(
            [sys.executable, "-c", script, *flags], capture_output=True, text=True, check=True
        )
        peaks.append(int(result.stdout.split()[-1]))
    assert peaks[1] < 1.15 * peaks[0]
    assert peaks[1] < 600_000  # KiB


def test_novels_of_every_layout_come_in_whole_sentences(shared_data, tmp_path):
    """A sentence that was cut at the end of a wrapped line would go on with a small letter."""
    model = shared_data / "tokenizer" / "spiece.model"
    for name in ("Doyle_Hound_1902", "Kipling_Kim_1901", "Hardy_Tess_1891", "Ford_Soldier_1915"):
        prepare.main(
            [
                f"--input={shared_data}/corpus/en_novels/{name}.txt",
                "--document=file",
                "--cased",
                f"--tokenizer={model}",
                f"--output={tmp_path / name}",
            ]
        )
        made = store.open_store(tmp_path / name)
        # Cased text and this vocabulary: a capital is unknown, after the mark of a new word.
        known = made.tokenizer()
        shards = [shard for split in store.SPLITS for shard in made.split(split)]
        starts = np.concatenate([shard.tokens[shard.sentences[:-1]] for shard in shards])
        small = sum(known.piece(token_id)[1:2].islower() for token_id in starts.tolist())
        assert len(starts) > 2500
        assert small < 0.04 * len(starts)
