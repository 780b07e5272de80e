"""Documents out of datasets of TensorFlow Datasets: an example is a document, a feature its text.

In:  `tfds:NAME` or `tfds:NAME@SPLIT`; the feature's name is `reading.text_field`.
Out: sources, their units, and documents as lists of lines.

A source is `tfds:NAME@SPLIT`, with `:FOLDER` behind it where the datasets are not in TFDS' usual
folder, so that whoever reads a unit finds it. A unit is some of the dataset's own shards, and an
example is read in the order in which TFDS stored it, whatever the file format.

This is the only module for preparation that imports TensorFlow.
"""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import logging as absl_logging

from albert_jax.data import lines, sources
from albert_jax.errors import UserError

_EXAMPLES = 64  # read at once


def find(item: str, data_dir: str | None) -> list[str]:
    """The sources that `tfds:NAME@SPLIT` names; without a split it is `train`, `a+b` are two.

    Args:
        item: the name.
        data_dir: where TFDS keeps its datasets; None for TFDS_DATA_DIR, or its usual folder.

    Raises:
        UserError: no such dataset, not downloaded, or without that split.
    """
    name, _, splits = item.removeprefix(sources.TFDS).partition("@")
    folder = data_dir or os.environ.get("TFDS_DATA_DIR", "")
    found = []
    for split in (splits or "train").split("+"):
        path = f"{sources.TFDS}{name}@{split}" + (f":{folder}" if folder else "")
        _shards(path)
        found.append(path)
    return found


def state(path: str) -> list[int]:
    """Bytes of all shards, and when the newest was written."""
    files = [Path(file) for _, _, file in _shards(path)]
    newest = max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)
    return [sum(size for size, _, _ in _shards(path)), newest]


def units(path: str, largest: int) -> list[sources.Unit]:
    """Stretches of at least `largest` bytes, but for the last, that end with a shard."""
    found = []
    start = end = 0
    for size, _, _ in _shards(path):
        end += size
        if end - start >= largest:
            found.append(sources.Unit(path, "tfds", start, end))
            start = end
    if end > start:
        found.append(sources.Unit(path, "tfds", start, end))
    return found


def documents(
    unit: sources.Unit,
    reading: sources.Reading,
    skipped: sources.Skipped,
    advance: Callable[[int], None],
) -> Iterator[list[str]]:
    """The documents of a unit, each a list of lines.

    Raises:
        UserError: a feature that is not there, or no text; a damaged shard with the number of its
            example, unless `reading.skip_errors`.
    """
    position = first = 0  # bytes and examples before a shard
    for size, count, file in _shards(unit.path):
        if unit.start <= position < unit.end:
            slice_ = "" if count is None else f"[{first}:{first + count}]"
            yield from _shard(unit, slice_, first, file, reading, skipped)
            advance(size)
        position += size
        first += count or 0


def _shard(
    unit: sources.Unit,
    slice_: str,
    number: int,
    file: str,
    reading: sources.Reading,
    skipped: sources.Skipped,
) -> Iterator[list[str]]:
    import tensorflow as tf

    def refuse(reason: str, place: str) -> None:
        sources.refuse(reason, place, unit, reading, skipped)

    for value in _values(unit.path, slice_, reading.text_field, tf.errors.OpError):
        if isinstance(value, Exception):
            reason = f"a damaged shard ({str(value).splitlines()[0]})"
            refuse(reason, f"{Path(file).name}, from example {number} on")
        elif found := lines.problem(value):
            refuse(f"a text that holds {found[0]}", f"example {number}")
        else:
            yield from sources.parts(value.decode(), unit, skipped)
        number += 1


def _values(
    path: str, slice_: str, field: str, damage: type[Exception]
) -> Iterator[bytes | Exception]:
    """The texts of a slice of a split; if something is damaged, last of all what it is."""
    import tensorflow_datasets as tfds

    builder, split = _builder(path)
    features: Any = builder.info.features
    _check(path, features, field)
    dataset = builder.as_dataset(
        split=split + slice_,
        shuffle_files=False,
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        # Nothing but the text is decoded.
        decoders=tfds.decode.PartialDecoding({field: features[field]}),
    )
    texts = dataset.map(lambda example: example[field])
    try:
        yield from texts.prefetch(_EXAMPLES).as_numpy_iterator()
    except damage as error:
        yield error


def _check(path: str, features: Any, field: str) -> None:
    import tensorflow_datasets as tfds

    names = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    if field not in names:
        raise UserError(
            f"{path} has no feature {field} (it has: {', '.join(names[:8]) or 'none'}; see "
            "--text_field)."
        )
    feature = features[field]
    if feature.np_dtype not in (object, str, bytes) or feature.shape != ():
        raise UserError(f"{path}: feature {field} is {feature}, not text; see --text_field.")


@functools.lru_cache(maxsize=8)
def _shards(path: str) -> list[tuple[int, int | None, str]]:
    """(bytes, examples, file) of each shard; of a stand-in for a dataset one, of a byte.

    Raises:
        UserError: no such dataset, not downloaded, or without that split.
    """
    builder, split = _builder(path)
    splits = builder.info.splits
    if not splits:
        # Not downloaded, or a stand-in (`tfds.testing.mock_data`), which knows no splits.
        try:
            builder.as_dataset(split=split)
        except AssertionError:
            name = builder.info.full_name
            raise UserError(
                f"--input={path}: {name} is not in {builder.data_dir}. Download it once with "
                f"`tfds build {name.rpartition('/')[0]}`, or say with --tfds_data_dir where it is."
            ) from None
        return [(1, None, path)]
    if split not in splits:
        raise UserError(
            f"--input={path}: there is no split {split}; there are: {', '.join(splits)}. "
            "Name one behind an @."
        )
    info = splits[split]
    files = [str(file) for file in info.filepaths]
    return [
        (os.stat(file).st_size, count, file)  # noqa: PTH116
        for file, count in zip(files, info.shard_lengths, strict=True)
    ]


def _builder(path: str) -> tuple[Any, str]:
    """TFDS' builder of a source, and the split."""
    # Takes seconds to import, and it warns of what does not matter here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    absl_logging.set_verbosity(absl_logging.ERROR)
    import tensorflow_datasets as tfds

    name, _, where = path.removeprefix(sources.TFDS).partition("@")
    split, _, folder = where.partition(":")
    try:
        return tfds.builder(name, data_dir=folder or None), split
    except (tfds.core.DatasetNotFoundError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"--input={sources.TFDS}{name}: TFDS has no such dataset ({first}); names are like "
            "tfds:wikipedia/20230601.en."
        ) from None
