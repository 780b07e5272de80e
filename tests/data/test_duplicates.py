"""What repeats is left out, the first of it stays, and nothing decides that but the text."""

import itertools
import pathlib
import random
import re

import numpy as np
import pytest

from albert_jax import prepare
from albert_jax.data import duplicates, quality, shards, sources, store, tokenizer
from albert_jax.errors import UserError
from tests import test_prepare

WORDS = [
    f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "re", "so") for b in ("ban", "dor", "fel", "gis")
]


@pytest.fixture
def small(monkeypatch):
    """Sizes at which little text goes the ways of much."""
    for name, value in (
        ("_PARAGRAPH_RUN", 13),
        ("_DOCUMENT_RUN", 4),
        ("_GROUP", 3),
        ("_SHINGLES", 9),
    ):
        monkeypatch.setattr(duplicates, name, value)


def decided(
    folder: pathlib.Path, files: list[list[list[str]]], wanted: quality.Quality
) -> list[list[list[str]]]:
    """What is left of the documents (paragraphs) of each file; a shard has two files."""
    folder.mkdir()
    for number, documents in enumerate(files):
        written = "\n\n".join("\n".join(document) for document in documents)
        (folder / f"{number}.txt").write_text(written)
    reading = sources.Reading()
    units = [
        unit
        for number in range(len(files))
        for unit in sources.units(str(folder / f"{number}.txt"), "", reading, 1 << 30)
    ]
    jobs = [
        duplicates.ScanJob(f"{i:05d}", tuple(units[i : i + 2]), [i], folder / "d", reading, wanted)
        for i in range(0, len(units), 2)
    ]
    for job in reversed(jobs):  # in no particular order
        duplicates.scan(job, lambda size, count: None)
    duplicates.decide(jobs)
    return [
        list(
            duplicates.documents(
                unit, (job.name, number), reading, wanted, job.folder, sources.Skipped(), int
            )
        )
        for job in jobs
        for number, unit in enumerate(job.units)
    ]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."


@pytest.mark.parametrize("partition", [100, 1000, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_the_first_of_equal_paragraphs_stays(seed, partition, small, monkeypatch, tmp_path):
    monkeypatch.setattr(duplicates, "_PARTITION", partition)
    rng = random.Random(seed)
    some = [sentence(rng, rng.randint(1, 12)) for _ in range(30)]
    files = [
        [[rng.choice(some) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 9))]
        for _ in range(5)
    ]
    seen: set[str] = set()
    expected = []
    for documents in files:
        expected.append([])
        for document in documents:
            left = [p for p in document if len(p) < 40 or not (p in seen or seen.add(p))]
            if left:
                expected[-1].append(left)
    assert decided(tmp_path / "x", files, quality.Quality(unique_paragraphs=40)) == expected


def test_white_space_does_not_make_a_paragraph_another(small, tmp_path):
    files = [[["One  paragraph of\twords it is.", "And two."]], [["One paragraph of words it is."]]]
    left = decided(tmp_path / "x", files, quality.Quality(unique_paragraphs=10))
    assert left == [[["One  paragraph of\twords it is.", "And two."]], []]


def jaccard(one: list[str], other: list[str]) -> float:
    def sequences(document: list[str]) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", " ".join(document).lower())
        return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}

    a, b = sequences(one), sequences(other)
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("seed", range(3))
def test_documents_like_an_earlier_one_are_left_out_and_no_others(
    seed, small, monkeypatch, tmp_path
):
    rng = random.Random(seed)
    made: list[list[str]] = []
    for _ in range(70):
        if made and rng.random() < 0.6:
            words = " ".join(rng.choice(made)).split()
            for _ in range(rng.choice([0, 1, 2, 5, 12])):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
            made.append([" ".join(words)])
        else:
            made.append([sentence(rng, rng.randint(3, 150)) for _ in range(2)])
    files = [made[i : i + 12] for i in range(0, len(made), 12)]
    results = []
    for partition in (64, 1 << 20):
        monkeypatch.setattr(duplicates, "_PARTITION", partition)
        left = decided(tmp_path / str(partition), files, quality.Quality(unique_documents=0.8))
        results.append([document for documents in left for document in documents])
    assert results[0] == results[1]
    stays = iter(results[0])
    following = next(stays)
    dropped = 0
    for index, document in enumerate(made):
        likeness = max((jaccard(document, earlier) for earlier in made[:index]), default=0.0)
        if document == following:
            # Four standard errors of 128 values; likeness to what was itself left out is no reason.
            kept = [d for d in made[:index] if d in results[0]]
            assert max((jaccard(document, d) for d in kept), default=0.0) < 0.94
            following = next(stays, None)
        else:
            assert likeness > 0.66
            dropped += 1
    assert following is None
    assert dropped > 15


def test_a_repeat_of_what_was_left_out_with_its_document_stays(small, tmp_path):
    rng = random.Random(5)
    first = [sentence(rng, 200), sentence(rng, 200)]
    extra = sentence(rng, 20)
    files = [[first, [*first, extra], [sentence(rng, 30), extra]]]
    left = decided(
        tmp_path / "x", files, quality.Quality(unique_paragraphs=40, unique_documents=0.8)
    )
    assert left == [[files[0][0], files[0][2]]]


def test_signatures_estimate_likeness_in_every_script():
    rng = random.Random(6)
    alphabets = {
        "latin": (WORDS, " "),
        "han": ([chr(c) for c in range(0x4E00, 0x4F00)], ""),
        "thai": ([chr(c) for c in range(0x0E01, 0x0E2F)], ""),
        "devanagari": (
            ["\u0939\u093f\u0928\u094d\u0926\u0940" + chr(c) for c in range(0x0915, 0x0935)],
            " ",
        ),
    }
    for name, (words, space) in alphabets.items():
        for changed in (0, 3, 12, 60):
            one = rng.choices(words, k=600)
            other = list(one)
            for _ in range(changed):
                other[rng.randrange(600)] = rng.choice(words)
            a, b = ({tuple(t[i : i + 5]) for i in range(596)} for t in (one, other))
            estimate = np.mean(
                duplicates.signature(space.join(one)) == duplicates.signature(space.join(other))
            )
            assert abs(estimate - len(a & b) / len(a | b)) < 4 * 0.045, (name, changed)


def test_the_command_leaves_out_the_same_whoever_reads(tmp_path, capsys):
    rng = random.Random(7)
    repeated = [test_prepare.document(rng, 4).replace("\n", " ") for _ in range(40)]
    documents = []
    for _ in range(2500):
        lines = test_prepare.document(rng, rng.randint(4, 30)).split("\n")
        documents.append("\n".join([*lines, rng.choice(repeated)]))
    documents += documents[:300]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    flags = [
        f"--input={tmp_path}/text.txt",
        "--train_tokenizer",
        "--vocab_size=60",
        "--unique_paragraphs=60",
        "--unique_documents",
        "--min_characters=150",
    ]
    prepare.main([*flags, f"--output={tmp_path}/1", "--workers=1"])
    assert test_prepare.run(*flags, f"--output={tmp_path}/2", "--workers=2").returncode == 0
    assert test_prepare.contents(tmp_path / "1") == test_prepare.contents(tmp_path / "2")
    made = store.open_store(tmp_path / "1")
    assert len(made.split("train")) > 1
    counts = {reason: skip["count"] for reason, skip in made.manifest["skipped"].items()}
    assert counts["documents like an earlier one"] >= 300
    short = sum(len(document.replace("\n", "")) < 150 for document in documents)
    assert counts.get("documents of under 150 characters", 0) == short
    assert counts["paragraphs that repeat an earlier one"] > 1000
    assert made.manifest["quality"] == {
        "min_characters": 150,
        "unique_paragraphs": 60,
        "unique_documents": 0.8,
    }
    printed = capsys.readouterr().out
    for reason, count in counts.items():
        assert f"left out or cut: {count:,} {reason}" in printed
    assert not (tmp_path / "1" / shards.DUPLICATES).exists()


def test_resume_compares_again_what_has_changed(tmp_path):
    rng = random.Random(8)
    repeated = test_prepare.document(rng, 6).replace("\n", " ")
    for name in "abc":
        text = "\n\n".join(test_prepare.document(rng, 30) for _ in range(700))
        (tmp_path / f"{name}.txt").write_text(text)
    good = (tmp_path / "c.txt").read_bytes() + f"\n\n{repeated}\n\nSo it is. And so.\n".encode()
    sentences = [test_prepare.sentence(rng) for _ in range(900)]
    model = tokenizer.train(sentences, tmp_path / "x.model", 60, tokenizer.Normalization())
    flags = [f"--input={tmp_path}/*.txt", f"--tokenizer={model}", "--workers=1"]
    flags += ["--unique_paragraphs", f"--output={tmp_path}/store"]
    (tmp_path / "c.txt").write_bytes(good + b"\n\nbroken \xff here\n")
    with pytest.raises(UserError, match="--resume goes on from there"):
        prepare.main(flags)
    (tmp_path / "c.txt").write_bytes(good)
    first = (tmp_path / "a.txt").read_bytes()
    (tmp_path / "a.txt").write_bytes(f"{repeated}\n\n".encode() + first)
    prepare.main([*flags, "--resume"])
    prepare.main([*flags[:-1], f"--output={tmp_path}/other"])
    assert test_prepare.contents(tmp_path / "store") == test_prepare.contents(tmp_path / "other")
    skipped = store.open_store(tmp_path / "store").manifest["skipped"]
    assert skipped["paragraphs that repeat an earlier one"]["count"] == 1
    assert skipped["paragraphs that repeat an earlier one"]["first"].endswith("c.txt")


FILTER = """
def short(text: str) -> bool:
    return len(text) < 400

def language(text: str) -> str:
    return "de"

def broken(text: str) -> bool:
    return text.index("nowhere to be found") > 0
"""


@pytest.fixture
def filters(tmp_path, monkeypatch):
    (tmp_path / f"filters_{tmp_path.name}.py").write_text(FILTER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return f"filters_{tmp_path.name}"


def test_documents_are_kept_by_a_function_of_the_users_own(filters, tmp_path):
    rng = random.Random(9)
    documents = [test_prepare.document(rng, rng.randint(2, 12)) for _ in range(120)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    flags = [f"--input={tmp_path}/text.txt", "--train_tokenizer", "--vocab_size=60"]
    prepare.main([*flags, f"--output={tmp_path}/store", f"--keep={filters}:short", "--workers=1"])
    manifest = store.open_store(tmp_path / "store").manifest
    kept = sum(len(document) < 400 for document in documents)
    assert sum(split["documents"] for split in manifest["splits"].values()) == kept
    left_out = manifest["skipped"][f"documents that {filters}:short does not keep"]
    assert left_out["count"] == len(documents) - kept > 0
    assert len(manifest["quality"]["keep_sha256"]) == 64


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("{}:language", "returned 'de'; it must return True or False"),
        ("{}:broken", r"raised ValueError: substring not found .*filters_.*\.py, line 9"),
        ("{}:missing", "has no function missing"),
        ("nowhere_at_all:f", "nowhere_at_all cannot be imported from"),
        ("short", "names no function; give MODULE:FUNCTION"),
    ],
)
def test_what_is_wrong_with_that_function_is_one_message(keep, message, filters, tmp_path):
    (tmp_path / "text.txt").write_text("One text it is. And so.\n\nAnother one it is. And so.")
    with pytest.raises(UserError, match=message):
        prepare.main(
            [
                f"--input={tmp_path}/text.txt",
                "--train_tokenizer",
                f"--output={tmp_path}/store",
                f"--keep={keep.format(filters)}",
                "--workers=1",
            ]
        )
    assert not list(tmp_path.glob("store*"))


@pytest.mark.parametrize(
    "flag", ["--min_characters=-1", "--unique_paragraphs=-5", "--unique_documents=0.3"]
)
def test_impossible_values_are_refused_by_name(flag, tmp_path):
    with pytest.raises(UserError, match=re.escape(flag)):
        prepare.main([f"--input={tmp_path}", "--train_tokenizer", f"--output={tmp_path}/s", flag])


def test_in_groups_of_any_size_the_followers_are_found(monkeypatch):
    rng = np.random.default_rng(0)
    leaders = rng.integers(0, 1 << 32, (5, 128), np.uint32)
    chosen = rng.integers(0, 5, 40)
    signatures = [leaders[chosen[:15]], leaders[chosen[15:]]]
    members = [(0, i) for i in range(15)] + [(1, i) for i in range(25)]
    first = {int(np.flatnonzero(chosen == leader)[0]) for leader in np.unique(chosen)}
    for group in itertools.chain(range(1, 8), [40]):
        monkeypatch.setattr(duplicates, "_GROUP", group)
        found = list(duplicates._followers(members, signatures, 0.8))
        assert found == [index for index in range(40) if index not in first]
