"""Rows of tab-separated, comma-separated and JSON Lines files, each with the line it began in.

In:  UTF-8 files, with or without a byte-order mark, lines ended by LF or CRLF.
Out: (line, {column: cell}), lines counted from 1.

Tab-separated files know no quotes, as GLUE's: a `"` is a character like any other. With quote
handling an unbalanced one swallows rows without a word. Comma-separated files are quoted (RFC 4180)
and may hold line breaks inside a cell; there a quote that swallows rows is refused by its line.
"""

import csv
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from albert_jax.errors import UserError
from albert_jax.tasks.task import Problems

Row = tuple[int, dict[str, Any]]

SUFFIXES = (".tsv", ".csv", ".jsonl")
_LARGEST_CELL = 1 << 30  # characters; csv's own limit of 131,072 is less than a long document
_FEW_BREAKS = 3  # line breaks in a cell that are not yet looked at


def read(
    path: pathlib.Path, problems: Problems, needed: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """Rows of a file by what its name ends in: `.csv`, `.jsonl` (`.json`, `.ndjson`), else TSV.

    Args:
        path: the file.
        problems: takes note of rows that are left out.
        needed: columns there must be, each with the config field (or task) that asks for it.

    Raises:
        UserError: as `read_tsv`, `read_csv` and `read_jsonl` do.
    """
    readers: dict[str, Callable[..., Iterator[Row]]] = {
        ".csv": read_csv,
        ".jsonl": read_jsonl,
        ".json": read_jsonl,
        ".ndjson": read_jsonl,
    }
    return readers.get(path.suffix, read_tsv)(path, problems, needed)


def read_tsv(
    path: pathlib.Path,
    problems: Problems,
    needed: Mapping[str, str] | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Rows between tabs, nothing quoted; blank lines are passed over, and rows with another number
    of columns than the header left out.

    Args:
        path: the file.
        problems: takes note of rows that are left out.
        needed: as in `read`.
        names: of the columns, where the file has no header.

    Raises:
        UserError: an unreadable file, a column that is missing, or one that is there twice.
    """
    numbered = ((number, line) for number, line in lines(path) if line.strip())
    if names is None:
        first = next(numbered, None)
        if first is None:
            raise empty(path)
        names = _header(path, first[0], first[1].split("\t"), needed or {})
    for number, line in numbered:
        cells = line.split("\t")
        if len(cells) != len(names):
            problems.add("row with more or fewer columns than the header, left out", path, number)
            continue
        yield number, dict(zip(names, cells, strict=True))


def read_csv(
    path: pathlib.Path, problems: Problems, needed: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """Rows between commas, quoted where need be; a cell may hold line breaks.

    Args:
        path: the file.
        problems: takes note of rows that are left out.
        needed: as in `read`.

    Raises:
        UserError: as `read_tsv`; and quotes that are wrong, by the line where their row began: one
            that is never closed, one in mid-cell, or one that swallowed the rows after it.
    """
    csv.field_size_limit(_LARGEST_CELL)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    names: list[str] | None = None
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {begin}: the quotes of the row that begins here are wrong "
                f"({error}). A cell with a quote in it is written in quotes, and the quote twice: "
                '"so ""called"" cell".'
            ) from None
        if cells is None:
            break
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = _header(path, begin, cells, needed or {})
            continue
        swallowed = max(_swallowed_rows(cell, len(names)) for cell in cells)
        if swallowed:
            raise UserError(
                f"{path}, line {begin}: a quote that opens in this row swallows {swallowed} rows "
                "after it. Close it, or write a quote that is text twice and its cell in quotes."
            )
        if len(cells) != len(names):
            problems.add("row with more or fewer columns than the header, left out", path, begin)
            continue
        yield begin, dict(zip(names, cells, strict=True))
    if names is None:
        raise empty(path)


def read_jsonl(
    path: pathlib.Path, problems: Problems, needed: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """Rows that are JSON objects, one a line; lines that are not are left out.

    Args:
        path: the file.
        problems: takes note of lines that are left out.
        needed: as in `read`; a field may be missing in some rows, but not in all.

    Raises:
        UserError: an unreadable file, or one without a field that is needed.
    """
    seen: dict[str, None] = {}
    count = 0
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            problems.add("line that is no JSON object, left out", path, number)
            continue
        seen.update(dict.fromkeys(row))
        count += 1
        yield number, row
    if not count:
        raise empty(path)
    _refuse_missing(str(path), list(seen), needed or {})


def lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a text file; only LF and CRLF end a line.

    Raises:
        UserError: a file that cannot be read, or is not UTF-8.
    """
    text = _text(path)
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        yield number, line.removesuffix("\n").removesuffix("\r")


def files(
    folder: pathlib.Path, named: str, field: str, default: Sequence[str]
) -> list[pathlib.Path]:
    """The files a config field names, with commas between; else the first default there is.

    Args:
        folder: where names begin.
        named: the field's value; empty = not given.
        field: its name.
        default: names to be tried.

    Returns:
        Paths that exist; none where nothing is named and no default is there.

    Raises:
        UserError: a name without a file.
    """
    if not named:
        return [folder / name for name in default if (folder / name).exists()][:1]
    found = [folder / name.strip() for name in named.split(",") if name.strip()]
    for path in found:
        if not path.exists():
            raise UserError(
                f"{field}={named}: there is no {path}; names begin at data.path={folder}."
            )
    return found


def missing_train(folder: pathlib.Path, default: Sequence[str]) -> UserError:
    """The error for a task without rows to learn from."""
    return UserError(
        f"data.path={folder} holds no {' or '.join(default)}; give the folder that does, or name "
        "the file with task.train."
    )


def empty(path: pathlib.Path | str, problems: Problems | None = None) -> UserError:
    """The error for a file without a row that can be used."""
    said = "; ".join(problems.notes()) if problems else ""
    return UserError(f"{path} holds no row that can be used" + (f": {said}." if said else "."))


def _text(path: pathlib.Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The offset counts from behind a mark, but no file has both a mark and many such errors.
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: 0x{content[error.start]:02x} is not UTF-8. Convert the file: "
            "iconv -f WINDOWS-1252 -t UTF-8 (or whatever it was written in)."
        ) from None


def _header(
    path: pathlib.Path, line: int, cells: Sequence[str], needed: Mapping[str, str]
) -> list[str]:
    names = [cell.strip() for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{path}, line {line}: column {name!r} is there {names.count(name)} times; rename "
                "all but one."
            )
    _refuse_missing(f"{path}, line {line}", names, needed)
    return names


def _refuse_missing(where: str, names: Sequence[str], needed: Mapping[str, str]) -> None:
    for name, reason in needed.items():
        if name not in names:
            raise UserError(
                f"{where}: there is no column {name!r} ({reason}); there are: {', '.join(names)}."
            )


def _swallowed_rows(cell: str, columns: int) -> int:
    """How many rows a cell holds, by its line breaks; 0 where it is text of several lines.

    Text has a comma here and there, rows have the same number in every line.
    """
    if columns < 2 or cell.count("\n") <= _FEW_BREAKS:
        return 0
    whole = cell.split("\n")[1:-1]
    alike = sum(line.count(",") == columns - 1 for line in whole)
    return len(whole) if alike >= 0.9 * len(whole) else 0
