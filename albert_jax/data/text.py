"""What lies between a document's lines and its sentences: paragraphs.

In:  the lines of a document; its language.
Out: paragraphs, each in one line; and the sentences of a paragraph.

Inside a document lines come in two layouts, told apart document by document:

- one line is one paragraph of one or more sentences; or
- lines are wrapped at some width, with or without blank lines between paragraphs. Such a document
  has narrow lines, most of which stop in mid-sentence. Its lines are joined again (`paragraphs`).
"""

import itertools
import re

import sentencex

SENTENCE_LIMIT = 20_000  # characters; a longer sentence is cut at white space
_WRAPPED_WIDTHS = range(30, 141)  # characters a line; wrapped text is this wide

SENTENCE_END = re.compile(r"""[.!?:\u2026\u3002\uff01\uff1f]["'\u2019\u201d\u00bb)\]_*]*$""")
_OPENING_QUOTES = '"\u201c\u201e\u00ab'
_CLOSING_QUOTES = '"\u201d\u201c\u00bb'
# Written without spaces between words: a line may have been wrapped at any character.
_UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo", "yue", "wuu"})


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
        if not SENTENCE_END.search(line) and (
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
    if SENTENCE_END.search(line):
        return _is_full(line, following, width, unspaced)
    return len(line) > short


def _is_full(line: str, following: str, width: int, unspaced: bool) -> bool:
    """Whether the first word of the next line would not have fitted into this one."""
    word = 1 if unspaced else len(following.split(maxsplit=1)[0]) + 1
    return len(line) + word > width
