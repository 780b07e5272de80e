"""Prose is kept, everything else in a docstring is not; nothing is imported; nothing is said
twice."""

import inspect
import json
import warnings

import pytest

from albert_jax.data import python_docs

GOOGLE = """
    Resizes a picture to the size that was asked for.

    The longer side decides how much is cut away, and the `shorter` one is padded with the
    colour of the :class:`~pictures.frame.Frame` around it. See https://example.org for more.

    Args:
        picture: The picture to resize.
        size (tuple[int, int]): Width and height of the result; both have to be even numbers, or
            else the encoder that is behind this function will refuse the picture.
        mode: str, one of 'a', 'b'

    Returns:
        Tensor of shape (h, w).

    Raises:
        ValueError: If odd.

    Example:

        >>> resize(picture, (4, 6))
        This line is what the example prints, and it looks just like a sentence.

    Note: this is the way in which it has been done in all of the versions so far.
"""
GOOGLE_PROSE = [
    "Resizes a picture to the size that was asked for.",
    "The longer side decides how much is cut away, and the shorter one is padded with the "
    "colour of "
    "the Frame around it. See https://example.org for more.",
    "Width and height of the result; both have to be even numbers, or else the encoder that is "
    "behind "
    "this function will refuse the picture.",
    "Note: this is the way in which it has been done in all of the versions so far.",
]

NUMPY = """
    Weighs the letters of a word against those of another.

    Parameters
    ----------
    first : str, optional
        Compared from the left.
    second : array_like of shape (n, 2)
        The other word, which is read from the right until both of them meet in the middle or one
        of them comes to its end.

    Notes
    -----
    The scale has two pans, and **both** of them are read at the same time [1]_.

    ========  ======
    Letter    Weight
    ========  ======
    a         12
    ========  ======

    .. math::
        This is a formula that somebody has written as if it were a sentence.

    .. note:: A scale that is never emptied will soon be of no use to anybody.

    References
    ----------
    .. [1] A. Author, "The title of a book about scales", in a town, in the year 1850.
"""
NUMPY_PROSE = [
    "Weighs the letters of a word against those of another.",
    "The other word, which is read from the right until both of them meet in the middle or one "
    "of them "
    "comes to its end.",
    "The scale has two pans, and both of them are read at the same time.",
    "A scale that is never emptied will soon be of no use to anybody.",
]

SPHINX = """
    Sends a letter to the given address::

        This is code, although it is written here as a sentence of many words.

    :param letter: What is to be sent to the address, which is looked at by nobody on its way to
        there and by nobody on its way back.
    :type letter: str
    :returns: nothing at all
    :rtype: None

    ```
    Fenced code may also be made of words and have an end like this one here.
    ```

    - short item
    - An item of a list that is long enough to be read as a sentence of its own, and that ends in
      a full stop.

    def looks_like(code, and_is): return {"so": it, "is": left_out}.

    Copyright 2001 by the writer of the letter, who is also its reader.
"""
SPHINX_PROSE = [
    "What is to be sent to the address, which is looked at by nobody on its way to there and by "
    "nobody "
    "on its way back.",
    "An item of a list that is long enough to be read as a sentence of its own, and that ends "
    "in a full "
    "stop.",
]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [(GOOGLE, GOOGLE_PROSE), (NUMPY, NUMPY_PROSE), (SPHINX, SPHINX_PROSE), ("", []), ("One.", [])],
)
def test_the_sentences_of_a_docstring_are_kept_and_nothing_else(docstring, expected):
    assert python_docs.prose(inspect.cleandoc(docstring)) == expected


def module(folder, path, source):
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    return python_docs.Module(str(folder), path, file.stat().st_size)


def test_a_module_is_read_and_never_run(tmp_path):
    mark = tmp_path / "was_run"
    source = f'''"""The first of the sentences that this module has to say to its readers."""
open({str(mark)!r}, "w")

class Thing:
    """The second sentence is about the thing that is defined in this place."""

    x = "A string that is no docstring, although it is a sentence of many words."

    async def method(self):
        \'\'\'The third of them is about a method that does nothing for anybody.\'\'\'
        def inner():
            """The fourth is inside of the method, where it is seldom read at all."""
'''
    found = python_docs.extract(module(tmp_path, "pkg/a.py", source))
    assert [paragraph.split()[1] for paragraph in found.paragraphs] == [
        "first",
        "second",
        "third",
        "fourth",
    ]
    assert not mark.exists()


@pytest.mark.parametrize(
    "source",
    ['"""A docstring of a module that is', "\0" + '"""x"""' * 50, '"""' + "\\N{nope}" * 30 + '"""'],
)
def test_a_module_that_does_not_parse_is_counted(source, tmp_path):
    source += "\n" if source.startswith('"""') else ""
    found = python_docs.extract(
        module(tmp_path, "a.py", f'"""{"Much is said here. " * 30}"""\n{source}')
    )
    assert found.paragraphs == []
    assert found.skipped == "modules that do not parse"


def test_warnings_of_the_parser_stay_silent(tmp_path):
    source = '"""The backslash below is one that the parser would like to warn of."""\nx = "\\d"\n'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(python_docs.extract(module(tmp_path, "a.py", source)).paragraphs) == 1


def test_a_paragraph_is_written_once_by_the_first_that_says_it(tmp_path):
    said = "This sentence is said by two of the modules in this place."
    own = "This one is said by nobody else, so it is kept for the second."
    first, second, third = (python_docs.Module("", name, 1) for name in ("a.py", "b.py", "c.py"))
    about = python_docs.write(
        tmp_path / "docs.jsonl",
        [
            python_docs.Extract(first, [said, said], ""),
            python_docs.Extract(second, [said.replace("This", "THIS"), own], ""),
            python_docs.Extract(third, [said], "modules that do not parse"),
        ],
    )
    rows = [json.loads(line) for line in (tmp_path / "docs.jsonl").read_text().splitlines()]
    assert rows == [{"module": "a.py", "text": said}, {"module": "b.py", "text": own}]
    assert about["skipped"]["paragraphs that an earlier one repeats"] == 3
    assert about["packages"]["numpy"]


def test_the_installed_packages_give_prose():
    modules = python_docs.find_modules()
    paths = [found.path for found in modules]
    assert paths == sorted(paths)
    assert not any(part in ("tests", "albert_jax") for path in paths for part in path.split("/"))
    chosen = [found for found in modules if found.path.startswith("numpy/")]
    assert chosen
    paragraphs = [text for found in chosen for text in python_docs.extract(found).paragraphs]
    assert len(paragraphs) > 500
    for text in paragraphs:
        assert text[0].isupper()
        assert text.rstrip("\"')")[-1] in ".!?"
        assert "\n" not in text
        assert ">>>" not in text
        assert "``" not in text
    # Two extractions agree, as do their orders.
    assert paragraphs == [
        text for found in chosen for text in python_docs.extract(found).paragraphs
    ]
