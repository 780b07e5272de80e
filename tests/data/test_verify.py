"""A whole store is verified as whole; whatever is done to its files is found and named."""

import hashlib
import importlib.util
import json
import pathlib
import random
import shutil

import numpy as np
import pytest
import small_store

from albert_jax import prepare, storage
from albert_jax.data import store, tokenizer, verify
from albert_jax.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    return small_store.make(tmp_path_factory.mktemp("made"), documents=40)


@pytest.fixture
def made(whole, tmp_path) -> pathlib.Path:
    return shutil.copytree(whole, tmp_path / "store")


def files(made: pathlib.Path) -> list[pathlib.Path]:
    return sorted(made.rglob("*.npy"))


def broken(made: pathlib.Path) -> dict[str, str]:
    return verify.verify(str(made), workers=2).broken


def rewrite(path: pathlib.Path, change) -> None:
    """Changes an array, and the manifest with it: the hash is right and the length, too."""
    array = np.load(path, allow_pickle=False)
    change(array)
    content = path.read_bytes()
    path.write_bytes(content[: store.HEADER_BYTES] + array.tobytes())
    manifest = json.loads((path.parents[1] / store.MANIFEST).read_text())
    name, kind, _ = path.name.split(".")
    for shard in manifest["splits"][path.parent.name]["shards"]:
        if shard["name"] == name:
            shard["sha256"][kind] = hashlib.sha256(path.read_bytes()).hexdigest()
    store.write_manifest(path.parents[1], manifest)


def test_a_whole_store_is_whole(made, capsys):
    prepare.main([f"--verify={made}"])
    tokens = sum(split["tokens"] for split in store.open_store(made).manifest["splits"].values())
    assert f"{made} is whole: {len(files(made)) + 1} files, {tokens:,} tokens" in (
        capsys.readouterr().out
    )


def test_any_flipped_bit_of_any_file_is_found_and_the_file_named(made):
    rng = random.Random(1)
    for path in [*files(made), made / "tokenizer.model"]:
        content = path.read_bytes()
        for place in (0, store.HEADER_BYTES, len(content) - 1, rng.randrange(len(content))):
            flipped = bytearray(content)
            flipped[place] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            found = broken(made)
            assert list(found) == [path.relative_to(made).as_posix()]
            assert "SHA-256 begins" in next(iter(found.values()))
        path.write_bytes(content)
    assert broken(made) == {}


def test_all_that_is_broken_is_named_with_what_to_do(made, capsys):
    tokens, documents = made / "train/00000-of-00001.tokens.npy", files(made)[-3]
    content = bytearray(tokens.read_bytes())
    content[store.HEADER_BYTES + 20 : store.HEADER_BYTES + 22] = b"\xff\xff"
    tokens.write_bytes(content)
    size = documents.stat().st_size
    with documents.open("r+b") as file:
        file.truncate(size - 3)
    (made / "validation/00000-of-00001.sentences.npy").unlink()
    (made / "train/old.npy").write_bytes(b"?")
    with pytest.raises(UserError) as caught:
        prepare.main([f"--verify={made}", "--workers=1"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{made} is broken in 3 of 7 files:"
    assert lines[1].startswith(f"{tokens} holds other bytes than were written: its SHA-256 begins")
    assert lines[1].endswith("token 10 is 65,535, the vocabulary has 60")
    assert lines[2] == f"{documents} is {size - 3:,} bytes long, the manifest says {size:,}"
    assert lines[3] == f"{made}/validation/00000-of-00001.sentences.npy is missing"
    assert lines[4].startswith("Copy these files again")
    assert capsys.readouterr().out == f"note: {made}/train/old.npy does not belong to the store.\n"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("tokens", lambda a: a.__setitem__(-1, 60), "is 60, the vocabulary has 60"),
        ("sentences", lambda a: a.__setitem__(3, a[2]), r"entry 3 is .*, not more than .* before"),
        ("sentences", lambda a: a.__setitem__(0, 1), "begins with 1, not with 0"),
        ("documents", lambda a: a.__setitem__(-1, a[-1] + 1), "ends with .*, not with"),
        ("documents", lambda a: a.__setitem__(1, -5), "entry 1 is -5, not more than 0"),
    ],
)
def test_what_makes_no_sense_is_found_though_its_hash_is_right(kind, change, message, made):
    path = made / f"train/00000-of-00001.{kind}.npy"
    rewrite(path, change)
    with pytest.raises(UserError, match=message):
        prepare.main([f"--verify={made}"])
    assert "SHA-256" not in broken(made)[f"train/{path.name}"]


def test_offsets_are_checked_from_one_block_to_the_next(made, monkeypatch):
    monkeypatch.setattr(verify, "_BLOCK_BYTES", 256)
    assert broken(made) == {}
    path = made / "train/00000-of-00001.sentences.npy"
    rewrite(path, lambda a: a.__setitem__(32, a[31]))  # the first of the second block
    assert list(broken(made)) == [f"train/{path.name}"]


def test_a_manifest_that_cannot_be_gone_by_is_one_message(made):
    manifest = made / store.MANIFEST
    written = manifest.read_text()
    for content, message in (
        (written.replace('"format_version": 1', '"format_version": 2'), "update albert_jax"),
        (written.replace('"sentences"', '"clauses"'), "is damaged .*copy it again"),
        ("{", "cannot be read"),
    ):
        manifest.write_text(content)
        with pytest.raises(UserError, match=message):
            prepare.main([f"--verify={made}"])
    wrong = json.loads(written)
    wrong["splits"]["train"]["tokens"] += 1
    store.write_manifest(made, wrong)
    assert "its shards have" in broken(made)[store.MANIFEST]
    with pytest.raises(UserError, match="no token store"):
        prepare.main([f"--verify={made}/nowhere"])


def test_another_tokenizer_in_its_place_is_found(made):
    rng = random.Random(2)
    texts = [" ".join(rng.choices(["gal", "mun", "fer", "dol"], k=5)) for _ in range(50)]
    tokenizer.train(texts, made / "tokenizer.model", 28, tokenizer.Normalization())
    assert "is not the tokenizer of this store" in broken(made)["tokenizer.model"]
    (made / "tokenizer.model").unlink()
    assert broken(made) == {"tokenizer.model": "is missing"}


def test_verify_goes_with_nothing_that_makes_a_store(capsys):
    for other in ("--input=a", "--output=b", "--tokenizer=c", "--train_tokenizer"):
        with pytest.raises(SystemExit) as caught:
            prepare.main(["--verify=store", other])
        assert caught.value.code == 2
        assert "--verify makes no store" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("gcp_storage_emulator") is None,
    reason="gcp-storage-emulator is not installed",
)
def test_a_store_in_a_bucket_is_verified_where_it_is(made, monkeypatch):
    import bucket as bucket_lib

    with bucket_lib.served() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        storage._files.cache_clear()
        place = f"gs://{bucket_lib.NAME}/store"
        for path in made.rglob("*"):
            if path.is_file():
                storage.upload(path, f"{place}/{path.relative_to(made)}")
        assert verify.verify(place, 2).broken == {}
        name = "train/00000-of-00001.tokens.npy"
        storage.write(f"{place}/{name}", (made / name).read_bytes()[:-1] + b"\1")
        storage.delete(f"{place}/validation/00000-of-00001.tokens.npy")
        found = verify.verify(place, 2).broken
        assert sorted(found) == [name, "validation/00000-of-00001.tokens.npy"]
    storage._files.cache_clear()
