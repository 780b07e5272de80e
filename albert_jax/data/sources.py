"""What the input is, and the documents in it, a bounded piece at a time.

In:  glob patterns and names of TFDS datasets.
Out: `Unit`s, which are whole sources or stretches of one, cut by names and sizes alone; and the
     documents of a unit, each a list of paragraphs.

| format | read by | cut at |
|---|---|---|
| text, plain or packed | `lines` | blank lines, where they end a document; packed: not at all |
| JSON Lines, plain or packed | `lines` | lines; packed: not at all |
| WikiExtractor's `<doc ...>` | `lines` | `<doc`; packed: not at all |
| Parquet | `parquet_source` | row groups |
| TFDS | `tfds_source` | the dataset's own shards |

A stretch of a source begins with the first document (line, row group) that begins behind its start
and ends with the first that begins behind its end, so the units of a source hold each document
once. What cannot be read stops the work with its place, or is left out and counted (`Skipped`).
Nothing in a source is ever executed or unpickled.
"""

import dataclasses
import glob
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from albert_jax import storage
from albert_jax.data import text
from albert_jax.errors import UserError

DOCUMENT_LIMIT = 8 << 20  # characters; a longer document is cut at the end of a paragraph
FORMATS = ("text", "jsonl", "wikiextractor", "parquet")  # of files
PACKED = (".gz", ".bz2", ".xz", ".zst")
TFDS = "tfds:"
_WIKIEXTRACTOR = re.compile(r"wiki_\d+")
_JSON = (".jsonl", ".ndjson", ".json")
_PACKING = 3  # text packs to about a third


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are to be understood.

    Attributes:
        document: what ends a document of plain text: "blank_line" or "file".
        text_field: the field of a JSON object, the column of a Parquet file or the feature of a
            TFDS dataset that holds a document.
        language: ISO 639 code, for the rules of sentence ends.
        skip_errors: leave out what cannot be read and count it, instead of stopping.
    """

    document: str = "blank_line"
    text_field: str = "text"
    language: str = "en"
    skip_errors: bool = False


@dataclasses.dataclass(frozen=True)
class Unit:
    """A source, or the bytes `start` to `end` of a large one, up to the documents there."""

    path: str
    format: str  # one of FORMATS, or "tfds"
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes to be read from the disk."""
        return self.end - self.start


class Skipped(dict[str, tuple[int, str]]):
    """What was left out: reason → how often, and where first."""

    def add(self, reason: str, where: str, times: int = 1) -> None:
        """Counts `times` more of `reason`."""
        count, first = self.get(reason, (0, where))
        self[reason] = (count + times, first)

    def merge(self, other: "dict[str, tuple[int, str]]") -> None:
        """Adds another's counts; of the two first places, ours stays."""
        for reason, (count, where) in other.items():
            self.add(reason, where, count)


def find(inputs: Iterable[str], tfds_data_dir: str | None = None) -> list[str]:
    """The sources that the inputs name, each once, in order; files sorted within each pattern.

    Args:
        inputs: glob patterns, of files here or in a bucket (gs://), and `tfds:NAME` or
            `tfds:NAME@SPLIT`.
        tfds_data_dir: where TFDS keeps its datasets.

    Raises:
        UserError: a pattern that names nothing, or a folder; a dataset that is not there.
    """
    found: dict[str, None] = {}
    for item in inputs:
        if item.startswith(TFDS):
            from albert_jax.data import tfds_source

            found.update(dict.fromkeys(tfds_source.find(item, tfds_data_dir)))
        else:
            found.update(dict.fromkeys(_find_files(item)))
    return list(found)


def size(path: str) -> int:
    """Bytes of a source on the disk."""
    return state(path)[0]


def state(path: str) -> list[int]:
    """What tells whether a source is still the same: its size, and when it was last written."""
    if path.startswith(TFDS):
        from albert_jax.data import tfds_source

        return tfds_source.state(path)
    if storage.is_remote(path):
        return storage.state(path)
    status = Path(path).stat()
    return [status.st_size, status.st_mtime_ns]


def weight(path: str, size: int) -> int:
    """About how much text there is in so many bytes of a source, by its name."""
    return _PACKING * size if path.endswith((*PACKED, ".parquet")) else size


def units(path: str, file_format: str, reading: Reading, largest: int) -> list[Unit]:
    """The units of one source: stretches of `largest` bytes where it may be cut, else the whole.

    Args:
        path: the source.
        file_format: one of `FORMATS`, or "" to go by the name.
        reading: how it is understood; `document="file"` makes plain text uncuttable, as packing
            does.
        largest: bytes.
    """
    if path.startswith(TFDS):
        from albert_jax.data import tfds_source

        return tfds_source.units(path, largest)
    file_format = file_format or _format(path)
    total = size(path)
    whole = file_format == "text" and reading.document == "file"
    if whole or (path.endswith(PACKED) and file_format != "parquet"):
        largest = total
    return [
        Unit(path, file_format, start, min(start + largest, total))
        for start in range(0, total, max(largest, 1))
    ]


def documents(
    unit: Unit, reading: Reading, skipped: Skipped, advance: Callable[[int], None]
) -> Iterator[list[str]]:
    """The documents of a unit, each a list of paragraphs.

    Args:
        unit: what to read.
        reading: how.
        skipped: takes note of what is left out.
        advance: told the bytes read from the disk, as they are.

    Raises:
        UserError: what cannot be read, with its place, unless `reading.skip_errors`.
    """
    if unit.format == "tfds":
        from albert_jax.data import tfds_source as source
    elif unit.format == "parquet":
        from albert_jax.data import parquet_source as source
    else:
        from albert_jax.data import lines as source
    for document in source.documents(unit, reading, skipped, advance):
        found = text.paragraphs(document, reading.language)
        if found:
            yield found


def refuse(reason: str, place: str, unit: Unit, reading: Reading, skipped: Skipped) -> None:
    """Stops with the place of what is wrong, or counts it.

    Raises:
        UserError: unless `reading.skip_errors`.
    """
    where = f"{unit.path}, {place}"
    if not reading.skip_errors:
        raise UserError(
            f"{where}: {reason}. "
            "Mend it, or give --errors=skip to leave out what is bad and count it."
        )
    skipped.add(re.sub(r" \(.*\)", "", reason), where)


def parts(document: str, unit: Unit, skipped: Skipped) -> Iterator[list[str]]:
    """The lines of a text that is all there; of one over `DOCUMENT_LIMIT` in several parts."""
    lines = document.replace("\r\n", "\n").split("\n")
    while len(lines) > 1 and sum(map(len, lines)) > DOCUMENT_LIMIT:
        held = count = 0
        while held <= DOCUMENT_LIMIT:
            held += len(lines[count])
            count += 1
        part, rest = cut(lines[:count], unit, skipped)
        yield part
        lines = rest + lines[count:]
    yield lines


def cut(lines: list[str], unit: Unit, skipped: Skipped) -> tuple[list[str], list[str]]:
    """The lines up to the last end of a paragraph, and the rest; counted, and nothing is lost."""
    skipped.add(
        f"cuts in documents of over {DOCUMENT_LIMIT >> 20} Mi characters, without loss", unit.path
    )
    for index in range(len(lines) - 1, 0, -1):
        if not lines[index].strip() or text.SENTENCE_END.search(lines[index].rstrip()):
            return lines[: index + 1], lines[index + 1 :]
    return lines, []


def _format(path: str) -> str:
    name = Path(path).name
    for packed in PACKED:
        name = name.removesuffix(packed)
    if name.endswith(_JSON):
        return "jsonl"
    if name.endswith(".parquet"):
        return "parquet"
    return "wikiextractor" if _WIKIEXTRACTOR.fullmatch(name) else "text"


def _find_files(pattern: str) -> list[str]:
    if storage.is_remote(pattern):
        if found := storage.glob(pattern):
            return found
        folder = " It is a folder; name the files in it." if storage.listing(pattern) else ""
        raise UserError(f"--input={pattern} names no file there.{folder}")
    found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    if found == [pattern] and Path(pattern).is_dir():
        raise UserError(
            f"--input={pattern} is a folder; name the files in it, such as {pattern}/*.txt"
        )
    found = [path for path in found if not Path(path).is_dir()]
    if not found:
        raise UserError(f"--input={pattern} names no file (seen from {Path.cwd()}).")
    return found
