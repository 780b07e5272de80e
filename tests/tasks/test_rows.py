"""Rows of TSV, CSV and JSON Lines: every trap by its line, and nothing lost without a word."""

import pytest

from albert_jax.errors import UserError
from albert_jax.tasks import rows
from albert_jax.tasks.task import Problems


def _write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _read(path, needed=None):
    problems = Problems()
    return list(rows.read(path, problems, needed)), problems.notes()


def test_tsv_knows_no_quotes_and_takes_mark_and_crlf(tmp_path):
    path = _write(
        tmp_path, "a.tsv", '\ufeffid\ttext\r\n1\t"open\r\n\r\n2\t it\'s "so"\u2028\x85!\r\n'
    )
    found, notes = _read(path, {"id": "of it"})
    assert found == [
        (2, {"id": "1", "text": '"open'}),
        (4, {"id": "2", "text": ' it\'s "so"\u2028\x85!'}),
    ]
    assert notes == ()


def test_rows_with_other_columns_are_counted_with_their_line(tmp_path):
    path = _write(tmp_path, "a.tsv", "id\ttext\n1\ta\n2\tb\tc\n3\n4\td")
    found, (note,) = _read(path)
    assert [line for line, _ in found] == [2, 5]
    assert note.startswith("2 x row with more or fewer columns")
    assert f"{path}:3, {path}:4" in note


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.tsv", "id\tbody\n1\ta\n"), ("a.csv", "id,body\n1,a\n"), ("a.jsonl", '{"id":1,"body":""}')],
)
def test_a_missing_column_is_named_with_those_there(tmp_path, name, content):
    path = _write(tmp_path, name, content)
    with pytest.raises(UserError, match=r"no column 'text' \(task.text\); there are: id, body\."):
        _read(path, {"id": "x", "text": "task.text"})


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="line 1: column 'text' is there 2 times"):
        _read(_write(tmp_path, "a.csv", "text,id,text\n1,2,3\n"))


def test_csv_holds_line_breaks_in_quotes_and_lines_stay_right(tmp_path):
    path = _write(tmp_path, "a.csv", 'text,label\r\n"one\r\ntwo, ""x""",p\r\nthree,n\r\n')
    found, notes = _read(path)
    assert found == [
        (2, {"text": 'one\r\ntwo, "x"', "label": "p"}),
        (4, {"text": "three", "label": "n"}),
    ]
    assert notes == ()


@pytest.mark.parametrize(
    "bad",
    [
        '"never closed,p\n' + "more,n\n" * 50,
        '"word" and more,n\n',
        # Both quotes are well placed; what lies between are 30 rows.
        '"swallows,p\n' + "more,n\n" * 30 + 'and,ends"\n',
        '"swallows,p\n' + "more,n\n" * 30 + 'and ends",n\n',
        '"so long,p\n' + "more of it,n\n" * 20_000,
    ],
)
def test_wrong_quotes_are_refused_by_the_line_they_begin_in(tmp_path, bad):
    path = _write(tmp_path, "a.csv", "text,label\ngood,p\n" + bad)
    with pytest.raises(UserError, match=rf"{path}, line 3: .*quote"):
        _read(path)


def test_a_cell_of_many_lines_of_prose_is_no_swallowed_row(tmp_path):
    prose = "\n".join(f"Line {n} of a letter" + ", with a comma" * (n % 3 == 0) for n in range(60))
    found, _ = _read(_write(tmp_path, "a.csv", f'text,label\n"{prose}",p\nb,n\n'))
    assert [(line, row["label"]) for line, row in found] == [(2, "p"), (62, "n")]
    assert found[0][1]["text"] == prose


def test_a_cell_longer_than_csvs_own_limit_is_read(tmp_path):
    text = "word " * 40_000
    found, _ = _read(_write(tmp_path, "a.csv", f"text,label\n{text},p\n"))
    assert found[0][1]["text"] == text


def test_jsonl_leaves_out_what_is_no_object(tmp_path):
    path = _write(tmp_path, "a.jsonl", '{"text": "a\\nb"}\n[1]\n{"text": \n\n{"other": 1}\n')
    found, (note,) = _read(path, {"text": "task.text"})
    assert found == [(1, {"text": "a\nb"}), (5, {"other": 1})]
    assert note.startswith("2 x line that is no JSON object")
    assert f"{path}:2, {path}:3" in note


def test_what_is_no_utf8_or_no_file_or_empty_is_said(tmp_path):
    with pytest.raises(UserError, match=r"line 2: 0xe9 is not UTF-8.*iconv"):
        _read(_write(tmp_path, "a.tsv", b"id\ttext\n1\tcaf\xe9\n"))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        _read(tmp_path / "none.tsv")
    for name in ("b.tsv", "b.csv", "b.jsonl"):
        with pytest.raises(UserError, match="holds no row"):
            _read(_write(tmp_path, name, ""))


def test_named_files_are_found_or_refused_with_their_field(tmp_path):
    for name in ("dev.tsv", "a.tsv"):
        _write(tmp_path, name, "x")
    found = rows.files(tmp_path, "a.tsv, dev.tsv", "task.train", [])
    assert [path.name for path in found] == ["a.tsv", "dev.tsv"]
    assert rows.files(tmp_path, "", "task.train", ["train.tsv", "dev.tsv"]) == [found[1]]
    assert rows.files(tmp_path, "", "task.train", ["train.tsv"]) == []
    with pytest.raises(UserError, match=r"task\.train=b\.tsv: there is no .*b\.tsv"):
        rows.files(tmp_path, "b.tsv", "task.train", ["a.tsv"])
