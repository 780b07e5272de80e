"""What a run reads, as its config says: a token store, a mixture of several, Google's examples."""

import dataclasses
from pathlib import Path

from albert_jax.config import DataConfig
from albert_jax.data import google_examples, mixture, store
from albert_jax.errors import UserError

Corpus = store.Store | mixture.Stores | google_examples.GoogleExamples


def open_corpus(data: DataConfig) -> Corpus:
    """Opens `data.path`.

    Raises:
        UserError: it is not what `data.format` says, is not whole, or names stores that do not go
            together.
    """
    if data.format == google_examples.FORMAT:
        if (Path(data.path) / store.MANIFEST).exists():
            raise UserError(
                f"data.path={data.path} is a token store; set data.format=store to read it."
            )
        return google_examples.open_examples(data)
    if google_examples.are_records(data.path):
        raise UserError(
            f"data.path={data.path} are TFRecord files; set data.format={google_examples.FORMAT} "
            "if Google's script made them."
        )
    paths = [path.strip() for path in data.path.split(",") if path.strip()]
    whole = not reads_near(data)
    if len(paths) > 1:
        return mixture.open_stores(paths, data.weights, whole)
    if data.weights:
        raise UserError(
            f"data.weights={data.weights} is for several stores, but data.path={data.path} names "
            "one; name them all, with commas between, or leave the weights out."
        )
    return store.open_store(data.path, whole)


def reads_near(data: DataConfig) -> bool:
    """Whether the tokens of stores in a bucket are made local a few shards at a time."""
    return data.shuffle == "shard" and data.cache_gib > 0


def parts(data: Corpus) -> tuple[tuple[str, Corpus], ...]:
    """Name and data of each part that is evaluated on its own."""
    if isinstance(data, mixture.Stores):
        return tuple(zip(data.names, data.stores, strict=True))
    return (("", data),)


def weights(data: Corpus) -> tuple[float, ...]:
    """What each part counts in the whole."""
    return tuple(map(float, data.weights)) if isinstance(data, mixture.Stores) else (1.0,)


def other(data: DataConfig, path: str) -> DataConfig:
    """What a run is evaluated on that reads `data` but is given another path: the held-out part of
    stores, or all records of files.
    """
    if data.format == "store" or (Path(path) / store.MANIFEST).exists():
        return dataclasses.replace(data, format="store", path=path, weights="")
    return dataclasses.replace(data, path=path, validation_path=path)
