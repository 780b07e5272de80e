"""Records come back by number as TensorFlow wrote them, and nothing damaged gets through."""

import gzip
import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from albert_jax.data import tfrecord
from albert_jax.errors import UserError


def write(path: pathlib.Path, records: list[bytes]) -> pathlib.Path:
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return path


def some(seed: int, count: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.bytes(int(length)) for length in rng.integers(0, 70, count)]


def read_all(paths: list[pathlib.Path]) -> list[bytes]:
    records = tfrecord.index(paths)
    return [records.read(number) for number in range(len(records))]


def test_records_of_files_are_numbered_through(tmp_path: pathlib.Path):
    parts = [some(1, 3), [], some(2, 70_000), [b""]]
    paths = [write(tmp_path / f"{i}.tfrecord", part) for i, part in enumerate(parts)]
    wanted = [record for part in parts for record in part]
    records = tfrecord.index(paths)
    assert len(records) == len(wanted)
    for number in [*range(70), *range(65_530, 65_550), *range(69_990, 70_004)]:
        assert records.read(number) == wanted[number]


def test_no_flipped_bit_gets_through(tmp_path: pathlib.Path):
    path = write(tmp_path / "some.tfrecord", [b"seven77", b"", b"x" * 19])
    whole = path.read_bytes()
    begins = [0, 23, 39, len(whole)]
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        record = next(begin for begin, end in itertools.pairwise(begins) if place < end)
        with pytest.raises(UserError) as caught:
            read_all([path])
        if record or place >= 12:  # else it is not known for a TFRecord file at all
            assert f"byte {record:,}" in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_file_that_ends_early_is_named(tmp_path: pathlib.Path):
    path = write(tmp_path / "some.tfrecord", [b"seven77", b"", b"x" * 19])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length in (0, 23, 39):  # at a record's end nothing tells
            assert len(tfrecord.index([path])) == [0, 23, 39].index(length)
            continue
        begin = max(begin for begin in (0, 23, 39) if begin < length)
        with pytest.raises(UserError, match=f"ends inside the record that begins at byte {begin}"):
            tfrecord.index([path])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"input_ids: 1 2 3 and more", "is no TFRecord file"),
        (gzip.compress(b"x" * 100), "is compressed; .* gunzip"),
    ],
    ids=["text", "gzip"],
)
def test_what_is_no_tfrecord_file_is_refused(content: bytes, message: str, tmp_path: pathlib.Path):
    path = tmp_path / "other.tfrecord"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        tfrecord.index([path])
    with pytest.raises(UserError, match="nowhere cannot be read"):
        tfrecord.index([tmp_path / "nowhere"])
