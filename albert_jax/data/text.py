"""Files of text to documents, paragraphs and sentences, a bounded piece at a time.

In:  UTF-8 text or JSON Lines, plain or `.gz`, cut into `Unit`s: a file, or a stretch of one.
Out: documents, each a list of paragraphs; and the sentences of a paragraph.

A blank line ends a document of plain text, unless every file is one (`document="file"`) or a
document is a JSON field; there it ends a paragraph. Inside a document lines come in two layouts,
told apart document by document:

- one line is one paragraph of one or more sentences; or
- lines are wrapped at some width, with or without blank lines between paragraphs. Such a document
  has narrow lines, most of which stop in mid-sentence. Its lines are joined again (`paragraphs`).

No more than a document is ever held, and one longer than `DOCUMENT_LIMIT` comes in parts. What
cannot be read stops the work with its place, or is left out and counted (`Skipped`).
"""

import dataclasses
import glob
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import sentencex

from albert_jax.errors import UserError

DOCUMENT_LIMIT = 8 << 20  # characters; a longer document is cut at the end of a paragraph
LINE_LIMIT = 16 << 20  # bytes; a longer line is no text
SENTENCE_LIMIT = 20_000  # characters; a longer sentence is cut at white space
_BLOCK = 1 << 20  # bytes read at once
_WRAPPED_WIDTHS = range(30, 141)  # characters a line; wrapped text is this wide

_CONTROL_CHARACTERS = bytes(set(range(32)) - set(b"\t\n\v\f\r")) + b"\x7f"
_BYTE_ORDER_MARK = "\ufeff"
_SENTENCE_END = re.compile(r"""[.!?:\u2026\u3002\uff01\uff1f]["'\u2019\u201d\u00bb)\]_*]*$""")
_OPENING_QUOTES = '"\u201c\u201e\u00ab'
_CLOSING_QUOTES = '"\u201d\u201c\u00bb'
_BLANK_LINE = re.compile(rb"\n[ \t\r\f\v]*\n")
# Written without spaces between words: a line may have been wrapped at any character.
_UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo", "yue", "wuu"})


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are to be understood.

    Attributes:
        document: what ends a document of plain text: "blank_line" or "file".
        text_field: the field of a JSON object that holds a document.
        language: ISO 639 code, for the rules of sentence ends.
        skip_errors: leave out what cannot be read and count it, instead of stopping.
    """

    document: str = "blank_line"
    text_field: str = "text"
    language: str = "en"
    skip_errors: bool = False


@dataclasses.dataclass(frozen=True)
class Unit:
    """A file, or the bytes `start` to `end` of a large one, up to the documents there."""

    path: str
    format: str  # "text" or "jsonl"
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


def find_files(patterns: Iterable[str]) -> list[str]:
    """The files that the glob patterns name, sorted within each pattern, each once.

    Raises:
        UserError: a pattern that names nothing, or a folder.
    """
    files: dict[str, None] = {}
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        if found == [pattern] and Path(pattern).is_dir():
            raise UserError(
                f"--input={pattern} is a folder; name the files in it, such as {pattern}/*.txt"
            )
        found = [path for path in found if not Path(path).is_dir()]
        if not found:
            raise UserError(f"--input={pattern} names no file (seen from {Path.cwd()}).")
        files.update(dict.fromkeys(found))
    return list(files)


def units(path: str, file_format: str, reading: Reading, largest: int) -> list[Unit]:
    """The units of one file: stretches of `largest` bytes where it may be cut, else the file.

    Args:
        path: the file.
        file_format: "text", "jsonl", or "" to go by the name.
        reading: how it is understood; `document="file"` makes plain text uncuttable, as `.gz` is.
        largest: bytes.
    """
    name = Path(path).name.removesuffix(".gz")
    if not file_format:
        file_format = "jsonl" if name.endswith((".jsonl", ".ndjson", ".json")) else "text"
    size = Path(path).stat().st_size
    whole = path.endswith(".gz") or (file_format == "text" and reading.document == "file")
    step = size if whole else largest
    return [
        Unit(path, file_format, start, min(start + step, size))
        for start in range(0, size, max(step, 1))
    ]


def documents(
    unit: Unit, reading: Reading, skipped: Skipped, advance: Callable[[int], None]
) -> Iterator[list[str]]:
    """The documents of a unit, each a list of paragraphs.

    A unit begins with the first document (JSON: line) that begins behind its start and ends with
    the first that begins behind its end, so that the units of a file hold each document once.

    Args:
        unit: what to read.
        reading: how.
        skipped: takes note of what is left out.
        advance: told the bytes read from the disk, as they are.

    Raises:
        UserError: what cannot be read, with its file, line and byte, unless `reading.skip_errors`.
    """
    lines = _Lines(unit, reading, skipped, advance)
    pieces = _json_documents(lines) if unit.format == "jsonl" else _text_documents(lines)
    for document in pieces:
        found = paragraphs(document, reading.language)
        if found:
            yield found


def paragraphs(lines: list[str], language: str = "en") -> list[str]:
    """The paragraphs of a document's lines; lines that were wrapped are joined again.

    A document counts as wrapped if its lines are narrow and at least two in five go on in the next
    one: they stop in mid-sentence, and the next begins with a small letter or its first word would
    not have fitted. In a wrapped document a blank line ends a paragraph; so does the end of a
    sentence in a line that had room for the next word, and a short line before a capital (headings,
    verse).
    """
    lines = [line.strip() for line in lines]
    lengths = sorted(len(line) for line in lines if line)
    if len(lengths) < 2:
        return [line for line in lines if line]
    # The widest but for one line in twenty: tables and slips stick out.
    width = lengths[-1 - len(lengths) // 20]
    unspaced = language.partition("-")[0] in _UNSPACED_LANGUAGES
    if width not in _WRAPPED_WIDTHS or not _is_wrapped(lines, width, unspaced):
        return [line for line in lines if line]
    return _unwrap(lines, width, 0.6 * lengths[len(lengths) // 2], unspaced)


def sentences(paragraph: str, language: str) -> list[str]:
    """The sentences of a paragraph, white space collapsed; an endless one comes in pieces."""
    found = []
    # The compiled module has no type stubs.
    segment = sentencex.segment  # pyright: ignore[reportAttributeAccessIssue]
    for sentence in segment(language, " ".join(paragraph.split())):
        while len(sentence) > SENTENCE_LIMIT:
            cut = sentence.rfind(" ", 1, SENTENCE_LIMIT)
            cut = cut if cut > 0 else SENTENCE_LIMIT
            found.append(sentence[:cut].strip())
            sentence = sentence[cut:]
        sentence = sentence.strip()
        if sentence:
            found.append(sentence)
    return found


def _is_wrapped(lines: list[str], width: int, unspaced: bool) -> bool:
    # Text all in small letters says nothing by them; a handful of lines says nothing by their
    # length.
    cased = any(line[:1].isupper() for line in lines)
    enough = len(lines) >= 5
    breaks = continued = 0
    for line, following in itertools.pairwise(lines):
        if not line or not following:
            continue
        breaks += 1
        if not _SENTENCE_END.search(line) and (
            (cased and following[0].islower())
            or (enough and _is_full(line, following, width, unspaced))
        ):
            continued += 1
    return breaks > 0 and continued >= 0.4 * breaks


def _unwrap(lines: list[str], width: int, short: float, unspaced: bool) -> list[str]:
    space = "" if unspaced else " "
    found: list[str] = []
    parts: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if not line:
            continue
        parts.append(line)
        if following and _goes_on(line, following, width, short, unspaced):
            # A word that was parted at its hyphen keeps it: "colour-" + "sergeant".
            parted = line[-1] == "-" and line[-2:-1].strip() and following[0].isalpha()
            parts.append("" if parted else space)
        else:
            found.append("".join(parts))
            parts = []
    return found


def _goes_on(line: str, following: str, width: int, short: float, unspaced: bool) -> bool:
    """Whether a paragraph of wrapped text goes on after `line`."""
    if following[0].islower():
        return True
    if line[-1] in _CLOSING_QUOTES and following[0] in _OPENING_QUOTES:
        return False  # another one speaks
    if _SENTENCE_END.search(line):
        return _is_full(line, following, width, unspaced)
    return len(line) > short


def _is_full(line: str, following: str, width: int, unspaced: bool) -> bool:
    """Whether the first word of the next line would not have fitted into this one."""
    word = 1 if unspaced else len(following.split(maxsplit=1)[0]) + 1
    return len(line) + word > width


def _text_documents(lines: "_Lines") -> Iterator[list[str]]:
    blank_ends = lines.reading.document == "blank_line"
    document: list[str] = []
    size = 0
    for block in lines:
        for line in block:
            if blank_ends and (not line or line.isspace()):
                if document:
                    yield document
                document, size = [], 0
                continue
            document.append(line)
            size += len(line)
            if size > DOCUMENT_LIMIT:
                cut = _last_paragraph_end(document)
                lines.skipped.add(
                    f"cuts in documents of over {DOCUMENT_LIMIT >> 20} Mi characters, without loss",
                    lines.unit.path,
                )
                yield document[:cut]
                document = document[cut:]
                size = sum(map(len, document))
    if document:
        yield document


def _last_paragraph_end(lines: list[str]) -> int:
    for index in range(len(lines) - 1, 0, -1):
        if not lines[index].strip() or _SENTENCE_END.search(lines[index].rstrip()):
            return index + 1
    return len(lines)


def _json_documents(lines: "_Lines") -> Iterator[list[str]]:
    field = lines.reading.text_field
    for block in lines:
        for index, line in enumerate(block):
            if not line or line.isspace():
                continue
            try:
                text = _json_text(line, field)
            except ValueError as error:
                # Only here does the place matter: where this line begins, counted back in bytes.
                before = sum(len(other.encode()) + 1 for other in block[:index])
                lines.refuse(str(error), lines.block_start + before)
                continue
            yield text.replace("\r\n", "\n").split("\n")


def _json_text(line: str, field: str) -> str:
    """The text of one line of JSON; ValueError says what is wrong with it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, where an object a line is wanted")
    if field not in record:
        fields = ", ".join(list(record)[:8]) or "none"
        raise ValueError(
            f"a JSON object without the field {field} (it has: {fields}; see --text_field)"
        )
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"a JSON object whose {field} is {type(text).__name__}, not a string")
    try:
        problem = _problem(text.encode())
    except UnicodeEncodeError:
        problem = ("half a surrogate pair", 0)
    if problem:
        raise ValueError(f"a JSON object whose {field} holds {problem[0]}")
    return text


def _problem(line: bytes) -> tuple[str, int] | None:
    """What makes these bytes no text, and at which of them; None where they are."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        hint = ""
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            hint = " (UTF-16? convert it: iconv -f UTF-16 -t UTF-8)"
        return f"invalid UTF-8: 0x{line[error.start]:02x}{hint}", error.start
    for place, byte in enumerate(line):
        if byte in _CONTROL_CHARACTERS:
            name = "a NUL character" if byte == 0 else f"control character U+{byte:04X}"
            return name, place
    return None


class _Lines:
    """The lines of a unit in blocks, decoded and checked; bad ones refused or left out."""

    def __init__(
        self, unit: Unit, reading: Reading, skipped: Skipped, advance: Callable[[int], None]
    ) -> None:
        self.unit = unit
        self.reading = reading
        self.skipped = skipped
        self.block_start = 0  # byte offset of the block last given out
        self._advance = advance

    def __iter__(self) -> Iterator[list[str]]:
        try:
            with Path(self.unit.path).open("rb") as raw:
                if self.unit.path.endswith(".gz"):
                    yield from self._unpacked(raw)
                else:
                    start, end = (
                        self._aligned(raw, self.unit.start),
                        self._aligned(raw, self.unit.end),
                    )
                    raw.seek(start)
                    yield from self._decoded(raw, start, end)
        except OSError as error:
            raise UserError(
                f"{self.unit.path} cannot be read: {error.strerror or error}."
            ) from None

    def refuse(self, reason: str, offset: int) -> None:
        """Stops with the place of what is wrong, or counts it."""
        where = f"{self.unit.path}, byte {offset}"
        if not self.reading.skip_errors:
            raise UserError(
                f"{self.unit.path}, line {self._line_number(offset)} (byte {offset}): {reason}. "
                "Mend it, or give --errors=skip to leave out what is bad and count it."
            )
        self.skipped.add(re.sub(r" \(.*\)", "", reason), where)

    def _unpacked(self, raw: BinaryIO) -> Iterator[list[str]]:
        told = 0
        try:
            with gzip.open(raw) as unpacked:
                for block in self._decoded(unpacked, 0, None):
                    self._advance(raw.tell() - told)
                    told = raw.tell()
                    yield block
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self.refuse(f"a damaged .gz ({error})", self.block_start)
        self._advance(self.unit.size - told)

    def _decoded(
        self, file: BinaryIO | gzip.GzipFile, start: int, end: int | None
    ) -> Iterator[list[str]]:
        position = start
        while end is None or position < end:
            block = file.read(_BLOCK if end is None else min(_BLOCK, end - position))
            if not block:
                return
            line_start = position + block.rfind(b"\n") + 1
            if not block.endswith(b"\n"):
                block += file.readline(LINE_LIMIT)
            self.block_start = position
            position += len(block)
            if position - line_start > LINE_LIMIT and not block.endswith(b"\n"):
                self.refuse(f"a line of over {LINE_LIMIT >> 20} MiB", line_start)
                block = block[: line_start - self.block_start]
                while True:
                    rest = file.readline(_BLOCK)
                    position += len(rest)
                    if not rest or rest.endswith(b"\n"):
                        break
            if end is not None:
                self._advance(position - self.block_start)
            yield self._lines_of(block)

    def _lines_of(self, block: bytes) -> list[str]:
        try:
            text = block.decode()
            clean = len(block.translate(None, _CONTROL_CHARACTERS)) == len(block)
        except UnicodeDecodeError:
            text, clean = "", False
        if clean:
            if self.block_start == 0:
                text = text.removeprefix(_BYTE_ORDER_MARK)
            return text.removesuffix("\n").split("\n")
        lines = []
        offset = self.block_start
        for line in block.removesuffix(b"\n").split(b"\n"):
            problem = _problem(line)
            if problem:
                reason, place = problem
                self.refuse(reason, offset + place)
            else:
                lines.append(line.decode().removeprefix(_BYTE_ORDER_MARK if offset == 0 else ""))
            offset += len(line) + 1
        return lines

    def _aligned(self, file: BinaryIO, offset: int) -> int:
        """Where the first document (JSON: line) behind `offset` begins; by these alone."""
        if offset in (0, file.seek(0, io.SEEK_END)):
            return offset
        position = offset - 1
        if self.unit.format == "text":
            file.seek(position)
            tail = b""
            # A document that goes on for longer than this is cut anyway.
            while position < offset + DOCUMENT_LIMIT:
                block = file.read(_BLOCK)
                if not block:
                    return position
                found = _BLANK_LINE.search(tail + block)
                if found:
                    return position - len(tail) + found.end()
                position += len(block)
                tail = block[-1024:]
        file.seek(position)
        while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
            pass
        return file.tell()

    def _line_number(self, offset: int) -> int:
        opener = gzip.open if self.unit.path.endswith(".gz") else open
        count = 1
        with opener(self.unit.path, "rb") as file:
            while offset > 0:
                block = file.read(min(_BLOCK, offset))
                if not block:
                    break
                count += block.count(b"\n")
                offset -= len(block)
        return count
