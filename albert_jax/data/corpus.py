"""What a run reads: a token store or Google's examples, as its config says."""

import dataclasses
from pathlib import Path

from albert_jax.config import DataConfig
from albert_jax.data import google_examples, store
from albert_jax.errors import UserError

Corpus = store.Store | google_examples.GoogleExamples


def open_corpus(data: DataConfig) -> Corpus:
    """Opens `data.path`.

    Raises:
        UserError: it is not what `data.format` says, or is not whole.
    """
    path = Path(data.path)
    is_store = (path / store.MANIFEST).exists()
    if data.format == google_examples.FORMAT:
        if is_store:
            raise UserError(f"data.path={path} is a token store; set data.format=store to read it.")
        return google_examples.open_examples(data)
    if not is_store and google_examples.are_records(data.path):
        raise UserError(
            f"data.path={path} are TFRecord files; set data.format={google_examples.FORMAT} if "
            "Google's script made them."
        )
    return store.open_store(path)


def other(data: DataConfig, path: str) -> DataConfig:
    """What a run is evaluated on that reads `data` but is given another path: the held-out part of
    a store, or all records of files.
    """
    if (Path(path) / store.MANIFEST).exists() or data.format == "store":
        return dataclasses.replace(data, format="store", path=path)
    return dataclasses.replace(data, path=path, validation_path=path)
