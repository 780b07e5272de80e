"""Every kind of source gives the documents that were put in, whole or in stretches, and names what
is broken in it."""

import bz2
import gzip
import html
import json
import lzma
import random
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from albert_jax import prepare
from albert_jax.data import sources, store, text
from albert_jax.errors import UserError

PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


def written(rng: random.Random, count: int) -> list[str]:
    """Documents of a few lines, with what formats have to escape."""
    extra = ['a "b"', "c < d & e", "&lt;f&gt;", "caf\u00e9", "\u6d77\u5cb8", "\\n", "tab\tin"]
    return [
        "\n".join(
            f"Number {index}, line {line}, {rng.choice(extra)} {'so ' * rng.randint(0, 20)}here."
            for line in range(rng.randint(1, 5))
        )
        for index in range(count)
    ]


def read(path: str, largest: int = 1 << 30, file_format: str = "", **reading: object):
    """The documents of a source as lists of paragraphs, unit by unit; and what was skipped."""
    how, skipped, told = sources.Reading(**reading), sources.Skipped(), []
    documents = [
        document
        for unit in sources.units(path, file_format, how, largest)
        for document in sources.documents(unit, how, skipped, told.append)
    ]
    assert sum(told) == sources.size(path)
    return documents, skipped


def paragraphs(documents: list[str]) -> list[list[str]]:
    return [text.paragraphs(document.split("\n")) for document in documents]


def in_wikiextractor(documents: list[str]) -> bytes:
    parts = [
        f'<doc id="{i}" url="https://x.org/?curid={i}" title="Title "{i}" of it">\n'
        f'Title "{i}" of it\n\n{html.escape(document, quote=False)}\n</doc>\n'
        for i, document in enumerate(documents)
    ]
    return "".join(parts).encode()


def write_parquet(path, documents, group: int, **options: object) -> None:
    table = pa.table(
        {"id": list(range(len(documents))), "text": documents, "n": [1.5] * len(documents)}
    )
    pyarrow.parquet.write_table(table, path, row_group_size=group, **options)


@pytest.mark.parametrize("suffix", PACK)
def test_packed_files_give_what_was_packed(suffix, tmp_path):
    documents = written(random.Random(1), 50)
    for name, content in (
        ("x.txt", "\n\n".join(documents).encode()),
        ("x.jsonl", "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()),
        ("wiki_00", in_wikiextractor(documents)),
    ):
        packed = PACK[suffix](content)
        # Packers that work in parallel, and `cat`, leave several streams in a file.
        half = len(content) // 2
        several = PACK[suffix](content[:half]) + PACK[suffix](content[half:])
        path = tmp_path / f"{name}{suffix}"
        for stored in (packed, several):
            path.write_bytes(stored)
            assert read(str(path), 64)[0] == paragraphs(documents)


@pytest.mark.parametrize("suffix", PACK)
def test_a_damaged_packed_file_is_named_and_what_came_before_is_kept(suffix, tmp_path):
    rng = random.Random(2)
    # Words that do not pack, so that the packer's blocks are many.
    documents = [f"{rng.randbytes(40).hex()} is here. And so it is." for _ in range(20_000)]
    content = "\n\n".join(documents).encode()
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(PACK[suffix](content)[:-200])
    with pytest.raises(UserError, match=re.escape(f"{path}, line ") + rf".*a damaged {suffix}"):
        read(str(path))
    found, skipped = read(str(path), skip_errors=True)
    assert [count for count, _ in skipped.values()] == [1]
    assert len(found) > 8000
    assert found[:-1] == [[document] for document in documents[: len(found) - 1]]


def test_wikiextractor_gives_articles_without_titles_and_as_they_were(tmp_path):
    path = tmp_path / "wiki_07"
    documents = written(random.Random(3), 60)
    path.write_bytes(in_wikiextractor(documents))
    for largest in (1 << 20, 1, 77, 1000):
        assert read(str(path), largest)[0] == paragraphs(documents)
    assert sources.units(str(path), "", sources.Reading(), 1000)[0].format == "wikiextractor"


def test_broken_wikiextractor_output_is_named_and_counted(tmp_path):
    path = tmp_path / "wiki_00"
    good = in_wikiextractor(["First it is here.", "Second it is here."]).decode()
    path.write_text(good.replace("</doc>\n", "", 1) + "stray words\n")
    line = good.split("\n").index("</doc>") + 1
    with pytest.raises(UserError, match=r"wiki_00, line 1 \(byte 0\): a <doc> without its </doc>"):
        read(str(path))
    found, skipped = read(str(path), skip_errors=True)
    assert found == [["Second it is here."]]
    assert sorted(count for count, _ in skipped.values()) == [1, 1]
    path.write_text(good + '<doc id="9" url="" title="T">\nT\n\nIt stops in the mid')
    with pytest.raises(UserError, match=rf"line {2 * line + 1} .*without its </doc>"):
        read(str(path))


def test_row_groups_of_parquet_are_each_in_one_unit(tmp_path):
    rng = random.Random(4)
    documents = written(rng, 300)
    path = tmp_path / "x.parquet"
    for compression, group, dictionary in (
        ("snappy", 7, True),
        ("zstd", 50, False),
        ("none", 999, True),
    ):
        write_parquet(path, documents, group, compression=compression, use_dictionary=dictionary)
        for largest in (1 << 30, 300, 5000):
            assert read(str(path), largest)[0] == paragraphs(documents)


def test_parquet_columns_of_every_kind_of_string(tmp_path):
    documents = written(random.Random(5), 20)
    path = tmp_path / "x.parquet"
    for kind in (
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.binary(),
    ):
        column = pa.array([d.encode() for d in documents] if kind == pa.binary() else documents)
        pyarrow.parquet.write_table(pa.table({"body": column.cast(kind)}), path)
        assert read(str(path), text_field="body")[0] == paragraphs(documents)


def test_what_is_wrong_in_a_parquet_file_is_named_and_counted(tmp_path):
    path = tmp_path / "x.parquet"
    documents = written(random.Random(6), 40)
    values = [d.encode() for d in documents]
    values[13], values[25], values[26] = b"caf\xe9", None, b"a \0 b"
    pyarrow.parquet.write_table(
        pa.table({"text": pa.array(values, pa.binary())}), path, row_group_size=10
    )
    with pytest.raises(
        UserError, match=r"x.parquet, row group 1, row 3: a text that holds invalid UTF-8: 0xe9"
    ):
        read(str(path))
    found, skipped = read(str(path), skip_errors=True)
    kept = [d for i, d in enumerate(documents) if i not in (13, 25, 26)]
    assert found == paragraphs(kept)
    assert sum(count for count, _ in skipped.values()) == 3
    with pytest.raises(UserError, match=r"schema: no column body .it has: text; see --text_field"):
        read(str(path), text_field="body")
    pyarrow.parquet.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="column text is of int64, not of strings"):
        read(str(path))


def test_a_damaged_parquet_file_keeps_its_whole_row_groups(tmp_path):
    path = tmp_path / "x.parquet"
    documents = written(random.Random(7), 400)
    write_parquet(
        path, documents, 100, compression="none", use_dictionary=False, write_page_checksum=True
    )
    content = bytearray(path.read_bytes())
    content[content.index(b"Number 250,")] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"x.parquet, row group 2, from row 0 on: a damaged row group"
    ):
        read(str(path))
    found, skipped = read(str(path), skip_errors=True)
    assert found == paragraphs(documents[:200] + documents[300:])
    assert len(skipped) == 1
    path.write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"x.parquet, footer: not Parquet, or damaged"):
        read(str(path))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A dataset of three shards in a folder of TFDS', and its documents in the order stored."""
    tfds = pytest.importorskip("tensorflow_datasets")
    documents = written(random.Random(8), 53)

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "own_text"

        def _info(self):
            features = {"body": tfds.features.Text(), "id": np.int64}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(documents),
                "rest": self._generate_examples(documents[:7]),
            }

        def _generate_examples(self, texts):
            yield from ((i, {"body": body, "id": i}) for i, body in enumerate(texts))

    folder = tmp_path_factory.mktemp("tfds")
    builder = Builder(data_dir=folder)
    config = tfds.download.DownloadConfig(num_shards=3)
    builder.download_and_prepare(download_config=config)
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    rows = builder.as_dataset(split="train", shuffle_files=False, read_config=in_order)
    stored = [row["body"].decode() for row in tfds.as_numpy(rows)]
    assert sorted(stored) == sorted(documents)
    return folder, stored


def test_a_tfds_dataset_is_read_shard_by_shard(dataset):
    folder, stored = dataset
    (path,) = sources.find(["tfds:own_text"], str(folder))
    assert len(sources.units(path, "", sources.Reading(), 1)) == 3
    for largest in (1, 1 << 30):
        assert read(path, largest, text_field="body")[0] == paragraphs(stored)
    both = sources.find(["tfds:own_text:1.0.0@train+rest"], str(folder))
    assert [len(read(path, text_field="body")[0]) for path in both] == [53, 7]


@pytest.mark.parametrize(
    ("name", "reading", "message"),
    [
        ("nowhere_to_be_found", {}, "TFDS has no such dataset"),
        ("wikipedia/20230601.en", {}, "wikipedia/20230601.en/1.0.0 is not in .*`tfds build wiki"),
        ("own_text@valid", {}, "there is no split valid; there are: .*train"),
        ("own_text", {}, "has no feature text .it has: (id, body|body, id); see --text_field"),
        ("own_text", {"text_field": "id"}, "feature id is .* not text"),
    ],
)
def test_a_tfds_dataset_that_is_not_there_is_one_message(name, reading, message, dataset):
    with pytest.raises(UserError, match=message):
        read(sources.find([f"tfds:{name}"], str(dataset[0]))[0], **reading)


def test_a_damaged_tfds_shard_is_named_and_the_others_are_read(dataset, tmp_path):
    folder, stored = dataset
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shards = sorted(tmp_path.rglob("*train*"))
    content = bytearray(shards[1].read_bytes())
    content[len(content) // 2] ^= 1
    shards[1].write_bytes(content)
    (path,) = sources.find(["tfds:own_text"], str(tmp_path))
    with pytest.raises(
        UserError, match=r"train.tfrecord-00001-of-00003, from example \d+ on: a dam"
    ):
        read(path, text_field="body")
    found, skipped = read(path, text_field="body", skip_errors=True)
    assert [count for count, _ in skipped.values()] == [1]
    kept = paragraphs(stored)
    assert 30 < len(found) < 53
    assert [document for document in kept if document in found] == found


def test_the_command_reads_tfds_and_its_stand_in(dataset, tmp_path, shared_data):
    tfds = pytest.importorskip("tensorflow_datasets")
    flags = [f"--tokenizer={shared_data}/tokenizer/spiece.model", "--workers=1"]
    own = ["--input=tfds:own_text", f"--tfds_data_dir={dataset[0]}", "--text_field=body"]
    prepare.main([*own, f"--output={tmp_path}/own", *flags])
    text_file = tmp_path / "same.txt"
    text_file.write_text("\n\n".join(dataset[1]))
    prepare.main([f"--input={text_file}", f"--output={tmp_path}/same", *flags])
    own, same = (store.open_store(tmp_path / name).split("train") for name in ("own", "same"))
    for ours, theirs in zip(own, same, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.documents, theirs.documents)
    with tfds.testing.mock_data(num_examples=30):
        prepare.main(["--input=tfds:wiki40b/de", f"--output={tmp_path}/mock", *flags])
    manifest = store.open_store(tmp_path / "mock").manifest
    stored = sum(split["documents"] for split in manifest["splits"].values())
    # What it makes up is random letters, now and then without a space.
    assert stored + sum(skip["count"] for skip in manifest["skipped"].values()) == 30
