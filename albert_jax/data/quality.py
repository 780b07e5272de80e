"""Which documents are worth keeping: by their length, by a function of the user's, by duplicates.

In:  `Quality`, all of it off unless asked for.
Out: the documents of a unit that are long enough and that the function keeps; the others counted.

Languages are told apart by a function of the user's own rather than by a library: which classifier
is good enough depends on the languages at hand, the good ones come with models of up to a gigabyte,
and the same hook serves every other rule. The function is named on the command line, so it is the
user's program; nothing out of a data file is ever executed. What repeats is found by `duplicates`.
"""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from albert_jax.data import sources
from albert_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Quality:
    """What is left out.

    Attributes:
        min_characters: documents of fewer.
        keep: "module:function"; documents of which it does not say True.
        unique_paragraphs: paragraphs of at least so many characters that are, white space aside,
            the same as one before; 0 for none.
        unique_documents: documents that share at least this part of their five-word sequences with
            one before (the Jaccard index of the two sets, estimated); 0 for none.
    """

    min_characters: int = 0
    keep: str = ""
    unique_paragraphs: int = 0
    unique_documents: float = 0.0

    def __post_init__(self) -> None:
        """Raises UserError for values that make no sense, and for a function that is not there."""
        if self.min_characters < 0:
            raise UserError(f"--min_characters={self.min_characters} must not be negative.")
        if self.unique_paragraphs < 0:
            raise UserError(f"--unique_paragraphs={self.unique_paragraphs} must be at least 1.")
        if self.unique_documents and not 0.5 <= self.unique_documents <= 1:
            raise UserError(
                f"--unique_documents={self.unique_documents} must lie between 0.5 and 1."
            )
        if self.keep:
            _function(self.keep)

    @property
    def needs_comparison(self) -> bool:
        """Whether all documents have to be read before the first can be kept."""
        return bool(self.unique_paragraphs or self.unique_documents)

    def record(self) -> dict[str, Any]:
        """What is on, as JSON; of the user's function also the hash of its file."""
        record = {name: value for name, value in dataclasses.asdict(self).items() if value}
        if self.keep:
            path = inspect.getsourcefile(inspect.unwrap(_function(self.keep)))
            if path:
                record["keep_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        return record


def documents(
    unit: sources.Unit,
    reading: sources.Reading,
    quality: Quality,
    skipped: sources.Skipped,
    advance: Callable[[int], None],
) -> Iterator[list[str]]:
    """The documents of a unit that are kept, each a list of paragraphs; arguments as in `sources`.

    Raises:
        UserError: as `sources.documents`, and what went wrong in the user's function.
    """
    keep = _function(quality.keep) if quality.keep else None
    for paragraphs in sources.documents(unit, reading, skipped, advance):
        if quality.min_characters and sum(map(len, paragraphs)) < quality.min_characters:
            skipped.add(f"documents of under {quality.min_characters} characters", unit.path)
        elif keep and not _ask(keep, "\n".join(paragraphs), quality.keep, unit.path):
            skipped.add(f"documents that {quality.keep} does not keep", unit.path)
        else:
            yield paragraphs


def _ask(keep: Callable[[str], object], text: str, name: str, path: str) -> bool:
    about = f"--keep={name}, asked about a document of {path} that begins {text[:60]!r},"
    try:
        answer = keep(text)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{about} raised {type(error).__name__}: {error} ({frame.filename}, line "
            f"{frame.lineno})."
        ) from error
    if not isinstance(answer, bool | np.bool_):
        raise UserError(f"{about} returned {answer!r}; it must return True or False.")
    return bool(answer)


@functools.lru_cache(maxsize=1)
def _function(name: str) -> Callable[[str], object]:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(
            f"--keep={name} names no function; give MODULE:FUNCTION, such as mine:is_german for "
            "the function is_german of mine.py in this folder."
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"--keep={name}: {module_name} cannot be imported from {Path.cwd()} or the installed "
            f"packages ({type(error).__name__}: {error})."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"--keep={name}: {module_name} has no function {function_name}.")
    return function
