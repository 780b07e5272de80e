"""What is written comes back memory-mapped; what is not whole is not opened."""

import json
import random
import shutil

import bucket as bucket_lib
import numpy as np
import pytest

from albert_jax import storage
from albert_jax.data import examples, nearby, store, tokenizer
from albert_jax.errors import UserError


def documents(seed: int, count: int, vocab_size: int = 30_000) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(5, vocab_size, rng.integers(1, 19)) for _ in range(rng.integers(1, 8))]
        for _ in range(count)
    ]


def write(folder, name, pieces, dtype=np.uint16):
    """Writes lists of documents, each list at one go."""
    with store.ShardWriter(folder, name, dtype) as writer:
        for piece in pieces:
            sentences = [sentence for document in piece for sentence in document]
            writer.append(
                np.concatenate([np.zeros(0, np.int64), *sentences]),
                np.array([len(sentence) for sentence in sentences], np.int64),
                np.array([len(document) for document in piece], np.int64),
            )
    return writer.record


@pytest.fixture
def made(tmp_path):
    """A whole store of three shards, the last one without anything held out."""
    folder = tmp_path / "store"
    words = [f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "lmnr"]
    rng = random.Random(1)
    texts = [" ".join(rng.choices(words, k=9)) for _ in range(300)]
    (folder / "train").mkdir(parents=True)
    tokenizer.train(texts, folder / "tokenizer.model", 90, tokenizer.Normalization())
    sha = tokenizer.Tokenizer.load(folder / "tokenizer.model", tokenizer.Normalization()).sha256
    splits = {
        split: {
            "shards": [
                write(
                    folder / split,
                    f"{i:05d}-of-00003",
                    [documents(i, 5)] if not (held and i == 2) else [],
                )
                for i in range(3)
            ]
        }
        for held, split in enumerate(store.SPLITS)
    }
    store.write_manifest(
        folder,
        {
            "format_version": store.FORMAT_VERSION,
            "tokenizer": {"sha256": sha, "vocab_size": 90},
            "token_dtype": "uint16",
            "normalization": {"lower_case": True, "keep_accents": False},
            "unigram_loss": 3.25,
            "splits": splits,
        },
    )
    return folder


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_what_is_streamed_in_pieces_reads_as_one_shard(dtype, tmp_path):
    limit = np.iinfo(dtype).max
    whole = documents(3, 29, limit)
    pieces = [whole[:1], whole[1:1], whole[1:17], whole[17:]]
    record = write(tmp_path, "00000-of-00001", pieces, dtype)
    tokens_T, sentences, offsets = (
        np.load(tmp_path / f"00000-of-00001.{array}.npy", allow_pickle=False)
        for array in store.ARRAYS
    )
    assert (tokens_T.dtype, sentences.dtype, offsets.dtype) == (dtype, np.int64, np.int64)
    read = [
        [
            tokens_T[sentences[s] : sentences[s + 1]].tolist()
            for s in range(offsets[d], offsets[d + 1])
        ]
        for d in range(len(offsets) - 1)
    ]
    assert read == [[sentence.tolist() for sentence in document] for document in whole]
    assert record["tokens"] == len(tokens_T)
    assert (record["sentences"], record["documents"]) == (sum(map(len, whole)), 29)


def test_a_shard_with_nothing_in_it_is_three_valid_files(made):
    shard = store.open_store(made).split("validation")[2]
    assert shard.tokens.shape == (0,)
    assert shard.sentences.tolist() == shard.documents.tolist() == [0]


def test_a_split_is_mapped_not_read(made):
    for split in store.SPLITS:
        shards = store.open_store(made).split(split)
        assert len(shards) == 3
        for index, shard in enumerate(shards):
            assert isinstance(shard.tokens, np.memmap)
            assert not shard.tokens.flags.writeable
            if not (split == "validation" and index == 2):
                assert shard.documents[-1] == len(shard.sentences) - 1
                assert shard.sentences[-1] == len(shard.tokens)


def test_the_fingerprint_is_that_of_the_data_not_of_the_place(made, tmp_path):
    original = store.open_store(made).fingerprint
    shutil.copytree(made, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / store.MANIFEST).read_text())
    manifest["sources"] = [{"path": "somewhere/else.txt", "bytes": 5}]
    store.write_manifest(tmp_path / "copy", manifest)
    assert store.open_store(tmp_path / "copy").fingerprint == original
    for change in (
        lambda m: m["splits"]["train"]["shards"][1]["sha256"].update(tokens="0" * 64),
        lambda m: m["normalization"].update(lower_case=False),
        lambda m: m["tokenizer"].update(sha256="0" * 64),
        lambda m: m["splits"]["train"]["shards"].reverse(),
    ):
        changed = json.loads(json.dumps(manifest))
        change(changed)
        store.write_manifest(tmp_path / "copy", changed)
        assert store.open_store(tmp_path / "copy").fingerprint != original


def test_what_is_no_whole_store_is_refused_by_what_is_wrong_with_it(made, tmp_path):
    def refused(message):
        with pytest.raises(UserError, match=message):
            store.open_store(made)

    with pytest.raises(UserError, match="no token store"):
        store.open_store(tmp_path / "nowhere")
    manifest = made / store.MANIFEST
    written = manifest.read_text()
    for content, message in (
        ("{", "cannot be read"),
        ("[]", "not the manifest"),
        (
            written.replace('"format_version": 1', '"format_version": 2'),
            "format 2, .* reads up to 1",
        ),
    ):
        manifest.write_text(content)
        refused(message)
    manifest.unlink()
    refused("not a token store")
    (tmp_path / "later.unfinished").mkdir()
    with pytest.raises(UserError, match=r"was not finished.*--resume"):
        store.open_store(tmp_path / "later")
    manifest.write_text(written)
    store.open_store(made)
    for array in store.ARRAYS:
        file = made / "train" / f"00001-of-00003.{array}.npy"
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        refused(f"{file.name} is .* bytes long")
        file.unlink()
        refused(f"{file.name} is missing")
        file.write_bytes(content)
    store.open_store(made)


def test_another_tokenizer_in_its_place_is_noticed(made):
    assert store.open_store(made).tokenizer().vocab_size == 90
    tokenizer.train(
        ["gal mun fer dol bim"] * 9, made / "tokenizer.model", 28, tokenizer.Normalization()
    )
    with pytest.raises(UserError, match="is not the tokenizer of this store"):
        store.open_store(made).tokenizer()


def test_nothing_is_unpickled(made):
    file = made / "train" / "00000-of-00003.tokens.npy"
    size = file.stat().st_size
    np.save(file, np.array([{"harm": "done"}], dtype=object), allow_pickle=True)
    content = file.read_bytes()
    file.write_bytes(content.ljust(size, b"\0")[:size])
    with pytest.raises(UserError, match="cannot be read"):
        store.open_store(made).split("train")


def test_of_a_bucket_only_the_offsets_and_the_tokens_at_hand_are_on_the_disk(
    made, tmp_path, monkeypatch
):
    with bucket_lib.served() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
        storage._files.cache_clear()
        place = f"gs://{bucket_lib.NAME}/store"
        for file in made.rglob("*.*"):
            if file.is_file():
                storage.upload(file, f"{place}/{file.relative_to(made)}")
        here = store.open_store(made)
        there = store.open_store(place, whole=False)
        assert not list(there.path.rglob("*.npy"))

        def tokens_here() -> list[str]:
            return sorted(file.name[:5] for file in (there.path / "train").glob("*.tokens.npy"))

        words = examples.Vocabulary(30_000, 2, 3, 4, np.ones(30_000, bool), np.arange(30_000) < 5)
        options = examples.ExampleOptions(
            32, 5, 0.15, 3, 0.1, 3, "sop", "split", shuffle="shard", shuffle_shards=1
        )
        whole = examples.ExampleBuilder(here.split("train"), words, options)
        largest = max(shard["tokens"] for shard in here.manifest["splits"]["train"]["shards"])
        shards, near = nearby.of_store(there, "train", 2 * 2 * largest)
        assert tokens_here() == []
        few = examples.ExampleBuilder(shards, words, options, near)
        for first in range(0, 3 * whole.examples_per_epoch, 2):
            wanted, found = (each.batch(first, first + 2) for each in (whole, few))
            for name, values in wanted.items():
                np.testing.assert_array_equal(found[name], values)
            assert 1 <= len(tokens_here()) <= 3  # one at hand, one that comes, one on its way out
        storage._files.cache_clear()
