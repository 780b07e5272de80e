"""Documents out of Parquet files: a row is a document, a column has its text.

In:  a unit (see `sources`) of a Parquet file; the column's name is `reading.text_field`.
Out: documents as lists of lines.

A unit has the row groups that begin in its bytes, so a file is cut by its size alone, and no file
need be opened to know its units. Row groups are read one after another, some rows at a time.

This and `lines`, for `.zst`, are the modules that import pyarrow.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from albert_jax import storage
from albert_jax.data import lines, sources

_ROWS = 256  # decoded at once


def documents(
    unit: sources.Unit,
    reading: sources.Reading,
    skipped: sources.Skipped,
    advance: Callable[[int], None],
) -> Iterator[list[str]]:
    """The documents of a unit, each a list of lines.

    Raises:
        UserError: what cannot be read, with its file, row group and row, unless
            `reading.skip_errors`.
    """

    def refuse(reason: str, place: str) -> None:
        sources.refuse(reason, place, unit, reading, skipped)

    told = 0
    try:
        with _opened(unit.path) as raw:
            file: Any = pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True)
            wrong = _wrong_column(file.schema_arrow, reading.text_field)
            if wrong:
                refuse(wrong, "schema")
                groups = []
            else:
                groups = _groups(file.metadata, unit)
            for group in groups:
                for row, value in _values(file, group, reading.text_field, refuse):
                    place = f"row group {group}, row {row}"
                    if value is None:
                        refuse(f"no {reading.text_field}", place)
                    elif found := lines.problem(value):
                        refuse(f"a text that holds {found[0]}", place)
                    else:
                        yield from sources.parts(value.decode(), unit, skipped)
                size = min(file.metadata.row_group(group).total_byte_size, unit.size - told)
                advance(size)
                told += size
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        refuse(f"not Parquet, or damaged ({_first_line(error)})", "footer")
    advance(unit.size - told)


def _opened(path: str) -> Any:
    if storage.is_remote(path):
        return pa.PythonFile(storage.opened(path), "r")
    return pa.OSFile(path)


def _groups(metadata: Any, unit: sources.Unit) -> list[int]:
    """The row groups that begin in the unit."""
    groups = []
    for group in range(metadata.num_row_groups):
        column = metadata.row_group(group).column(0)
        # The dictionary, if there is one, is before the pages.
        begin = column.data_page_offset
        if column.has_dictionary_page and column.dictionary_page_offset is not None:
            begin = min(begin, column.dictionary_page_offset)
        if unit.start <= begin < unit.end:
            groups.append(group)
    return groups


def _wrong_column(schema: Any, name: str) -> str:
    """What is wrong with the column of that name; empty where it holds text."""
    if name not in schema.names:
        columns = ", ".join(schema.names[:8]) or "none"
        return f"no column {name} (it has: {columns}; see --text_field)"
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    ):
        return f"column {name} is of {kind}, not of strings"
    return ""


def _values(
    file: Any, group: int, column: str, refuse: Callable[[str, str], None]
) -> Iterator[tuple[int, bytes | None]]:
    """(row in its group, text as bytes), up to what is damaged."""
    row = 0
    try:
        batches = file.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False)
        for batch in batches:
            # As bytes: whether they are text is asked value by value.
            for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                yield row, value
                row += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = f"a damaged row group ({_first_line(error)})"
        refuse(reason, f"row group {group}, from row {row} on")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
