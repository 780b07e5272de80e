"""What a run reads: a token store, or several as a mixture, as its config says."""

import dataclasses

from albert_jax.config import DataConfig
from albert_jax.data import mixture, store
from albert_jax.errors import UserError

Corpus = store.Store | mixture.Stores


def open_corpus(data: DataConfig) -> Corpus:
    """Opens `data.path`.

    Raises:
        UserError: it is not whole, or names stores that do not go together.
    """
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


def parts(data: Corpus) -> tuple[tuple[str, store.Store], ...]:
    """Name and store of each part that is evaluated on its own."""
    if isinstance(data, mixture.Stores):
        return tuple(zip(data.names, data.stores, strict=True))
    return (("", data),)


def weights(data: Corpus) -> tuple[float, ...]:
    """What each part counts in the whole."""
    return tuple(map(float, data.weights)) if isinstance(data, mixture.Stores) else (1.0,)


def other(data: DataConfig, path: str) -> DataConfig:
    """What a run is evaluated on that reads `data` but is given another path."""
    return dataclasses.replace(data, path=path, weights="")
