"""Documents out of files of lines: plain text, JSON Lines, WikiExtractor's output; plain or packed.

In:  a unit (see `sources`) of UTF-8 text, plain or packed by gzip, bzip2, xz or Zstandard.
Out: documents as lists of lines.

A blank line ends a document of plain text, unless every file is one (`document="file"`) or a
document is a JSON field; there it ends a paragraph. WikiExtractor writes `<doc id= url= title=>`,
the title, the text with `<`, `>` and `&` escaped, and `</doc>`; the title is not text of the
article and is left away, as BERT's authors did with headings.

No more than a document is ever held, and one longer than `sources.DOCUMENT_LIMIT` comes in parts.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from albert_jax import storage
from albert_jax.data import sources
from albert_jax.errors import UserError

LINE_LIMIT = 16 << 20  # bytes; a longer line is no text
_BLOCK = 1 << 20  # bytes read at once

_CONTROL_CHARACTERS = bytes(set(range(32)) - set(b"\t\n\v\f\r")) + b"\x7f"
_BYTE_ORDER_MARK = "\ufeff"
# Where a document may begin, in the formats in which it is not any line.
_BOUNDARY = {
    "text": re.compile(rb"\n[ \t\r\f\v]*\n"),
    "wikiextractor": re.compile(rb"\n(?=<doc )"),
}
_WIKI_TITLE = re.compile(r'title="(.*)"\s*>\s*$')


def documents(
    unit: sources.Unit,
    reading: sources.Reading,
    skipped: sources.Skipped,
    advance: Callable[[int], None],
) -> Iterator[list[str]]:
    """The documents of a unit, each a list of lines.

    Raises:
        UserError: what cannot be read, with its file, line and byte, unless `reading.skip_errors`.
    """
    lines = _Lines(unit, reading, skipped, advance)
    if unit.format == "jsonl":
        return _json_documents(lines)
    return _wiki_documents(lines) if unit.format == "wikiextractor" else _text_documents(lines)


def problem(line: bytes) -> tuple[str, int] | None:
    """What makes these bytes no text, and at which of them; None where they are."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        hint = ""
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            hint = " (UTF-16? convert it: iconv -f UTF-16 -t UTF-8)"
        return f"invalid UTF-8: 0x{line[error.start]:02x}{hint}", error.start
    if len(line.translate(None, _CONTROL_CHARACTERS)) == len(line):
        return None
    place, byte = next((p, b) for p, b in enumerate(line) if b in _CONTROL_CHARACTERS)
    return "a NUL character" if byte == 0 else f"control character U+{byte:04X}", place


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
            if size > sources.DOCUMENT_LIMIT:
                part, document = sources.cut(document, lines.unit, lines.skipped)
                yield part
                size = sum(map(len, document))
    if document:
        yield document


def _json_documents(lines: "_Lines") -> Iterator[list[str]]:
    field = lines.reading.text_field
    for block in lines:
        for index, line in enumerate(block):
            if not line or line.isspace():
                continue
            try:
                text = _json_text(line, field)
            except ValueError as error:
                lines.refuse(str(error), _offset(lines.block_start, block, index))
                continue
            yield from sources.parts(text, lines.unit, lines.skipped)


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
        found = problem(text.encode())
    except UnicodeEncodeError:
        found = ("half a surrogate pair", 0)
    if found:
        raise ValueError(f"a JSON object whose {field} holds {found[0]}")
    return text


def _wiki_documents(lines: "_Lines") -> Iterator[list[str]]:
    document: list[str] | None = None
    title = ""
    size = 0
    place: tuple[int, list[str], int] = (0, [], 0)  # of the last `<doc`; counted if it is wanted
    for block in lines:
        for index, line in enumerate(block):
            if line.startswith("<doc ") and line.rstrip().endswith(">"):
                if document is not None:
                    lines.refuse("a <doc> without its </doc>", _offset(*place))
                place = lines.block_start, block, index
                named = _WIKI_TITLE.search(line)
                document, size, title = [], 0, named[1] if named else ""
            elif line.rstrip() == "</doc>" and document is not None:
                yield document
                document = None
            elif document is not None:
                line = line.strip()
                # As the writer escaped them, in reverse.
                for escaped, plain in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
                    line = line.replace(escaped, plain)
                if document or size or line != title:
                    document.append(line)
                size += len(line)
                if size > sources.DOCUMENT_LIMIT:
                    part, document = sources.cut(document, lines.unit, lines.skipped)
                    yield part
                    size = 1 + sum(map(len, document))
            elif line.strip():
                reason = "text outside of <doc ...> and </doc> (see --format)"
                lines.refuse(reason, _offset(lines.block_start, block, index))
    if document is not None:
        lines.refuse("a <doc> without its </doc>", _offset(*place))


def _offset(block_start: int, block: list[str], index: int) -> int:
    """Where a line of a block begins, in bytes; slow, so only where a place matters."""
    return block_start + sum(len(line.encode()) + 1 for line in block[:index])


class _Lines:
    """The lines of a unit in blocks, decoded and checked; bad ones refused or left out."""

    def __init__(
        self,
        unit: sources.Unit,
        reading: sources.Reading,
        skipped: sources.Skipped,
        advance: Callable[[int], None],
    ) -> None:
        self.unit = unit
        self.reading = reading
        self.skipped = skipped
        self.block_start = 0  # byte offset of the block last given out
        self._advance = advance

    def __iter__(self) -> Iterator[list[str]]:
        try:
            with storage.opened(self.unit.path) as raw:
                if self.unit.path.endswith(sources.PACKED):
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
        place = f"byte {offset}"
        if not self.reading.skip_errors:
            place = f"line {self._line_number(offset)} (byte {offset})"
        sources.refuse(reason, place, self.unit, self.reading, self.skipped)

    def _unpacked(self, raw: IO[bytes]) -> Iterator[list[str]]:
        told = 0
        try:
            with _unpacking(self.unit.path, raw) as unpacked:
                for block in self._decoded(unpacked, 0, None):
                    self._advance(raw.tell() - told)
                    told = raw.tell()
                    yield block
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, not the packing's
            packed = Path(self.unit.path).suffix
            self.refuse(f"a damaged {packed} ({error})", self.block_start)
        self._advance(self.unit.size - told)

    def _decoded(self, file: IO[bytes], start: int, end: int | None) -> Iterator[list[str]]:
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
            found = problem(line)
            if found:
                reason, place = found
                self.refuse(reason, offset + place)
            else:
                lines.append(line.decode().removeprefix(_BYTE_ORDER_MARK if offset == 0 else ""))
            offset += len(line) + 1
        return lines

    def _aligned(self, file: IO[bytes], offset: int) -> int:
        """Where the first document (JSON: line) behind `offset` begins; by these alone."""
        if offset in (0, file.seek(0, io.SEEK_END)):
            return offset
        position = offset - 1
        boundary = _BOUNDARY.get(self.unit.format)
        if boundary:
            # A document of text that goes on for longer than this is cut anyway.
            limit = offset + sources.DOCUMENT_LIMIT if self.unit.format == "text" else None
            file.seek(position)
            tail = b""
            while limit is None or position < limit:
                block = file.read(_BLOCK)
                if not block:
                    return position
                found = boundary.search(tail + block)
                if found:
                    return position - len(tail) + found.end()
                position += len(block)
                tail = block[-1024:]
        file.seek(position)
        while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
            pass
        return file.tell()

    def _line_number(self, offset: int) -> int:
        count = 1
        # What is damaged ends somewhere before its end.
        with (
            contextlib.suppress(EOFError, zlib.error, lzma.LZMAError, OSError),
            storage.opened(self.unit.path) as raw,
            _unpacking(self.unit.path, raw) as file,
        ):
            while offset > 0:
                block = file.read(min(_BLOCK, offset))
                if not block:
                    break
                count += block.count(b"\n")
                offset -= len(block)
        return count


def _unpacking(path: str, raw: IO[bytes]) -> IO[bytes]:
    """The text in a file, by its name."""
    if path.endswith(".zst"):
        # Takes a moment to import. Zstandard itself is in Python from 3.14 on.
        import pyarrow

        stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
        return cast(IO[bytes], io.BufferedReader(stream, _BLOCK))
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(Path(path).suffix)
    return cast(IO[bytes], opener(raw)) if opener else raw
