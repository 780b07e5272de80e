"""Words replaced by others that mean the same, and texts by paraphrases.

In:  texts; WordNet as tables (`synsets.tsv.gz`, `lemmas.tsv.gz`), or a TSV of words and synonyms.
Out: the same texts with some words changed; everything between words stays as it is.

Promise: what comes out is a pure function of text, lexicon, rate and generator; `generator` makes
one out of (seed, row, copy, segment), so no row depends on another or on their order.

What of WordNet is used. A word's part of speech and sense are not known here, so only safe ones
count: words that are mostly of one part of speech (by how many senses each has), by the first, most
frequent sense, and of its members those whose own first sense it is too, without spaces, digits or
capitals. Left out are words of grammar, which WordNet has in senses that nobody means (`as`:
arsenic, `may`: whitethorn), and words that may be another word's inflected form (`years`,
`watching`). Texts are matched as they are written: an inflected form is not turned into its lemma
and back, which English does not do by rule. That leaves some 25,000 words, an eighth of the words
of running English, so rates far above 0.1 are not reached with WordNet alone.
"""

import collections
import gzip
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from albert_jax.errors import UserError

BETWEEN_SYNONYMS = "|"
_SYNSETS, _LEMMAS = "synsets.tsv.gz", "lemmas.tsv.gz"
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
# Stretches without a word to be changed: what stands in brackets, and what has a digit in it.
_LEFT_ALONE = re.compile(r"\[[^\]]*\]|\S*\d\S*")
_PLAIN = re.compile(r"[a-z]{3,}")
_OPENING = " \t\r\n\"'\u2018\u2019\u201c\u201d("  # may stand before a sentence's first word
_SENTENCE_ENDS = tuple(".!?:\u2026")
_DOMINANT = 2  # times as many senses as in all other parts of speech
_VOWELS = frozenset("aeiou")
_GRAMMAR = frozenset(
    re.findall(
        r"\w+",
        """
        about above across after again against all along also although among and another any are
        around because been before being below beneath beside besides between beyond both but
        can could despite did does doing done down during each either else enough ere ever every
        except few for from get goes got had has have having hence her here hers him his how
        however into its itself just least less lest like many may might mine more most much
        must near neither never nor not now off once one only onto other our ours out outside
        over own past per quite rather same shall she should since some still such than that the
        their them then there these they this those though through throughout thus till too
        toward towards under unless until upon very was were what when where whereas whether
        which while who whole whom whose why will with within without would yes yet you your
        yours
        """,
    )
)


@dataclass(frozen=True)
class Lexicon:
    """Synonyms by word; a word in small letters also stands for itself with a capital."""

    synonyms: Mapping[str, tuple[str, ...]]

    def of(self, text: str, begin: int, end: int) -> tuple[str, ...]:
        """What may stand in the place of the word `text[begin:end]`, with its capital; may be none.

        A word with a capital that is not in the lexicon as written counts only where a sentence
        begins: elsewhere it is likely a name. After `a` and `an` the article has to fit.
        """
        word = text[begin:end]
        found = self.synonyms.get(word, ())
        if not found and _capitalised(word) and _begins_sentence(text, begin):
            found = tuple(one[0].upper() + one[1:] for one in self.synonyms.get(word.lower(), ()))
        article = re.search(r"\b[Aa]n?\s+$", text[max(0, begin - 4) : begin])
        if article:
            vowel = word[0].lower() in _VOWELS
            found = tuple(one for one in found if (one[0].lower() in _VOWELS) == vowel)
        return found


def generator(seed: int, row: int, copy: int, segment: int = 0) -> np.random.Generator:
    """Random numbers of one text of one copy of one row."""
    return np.random.Generator(np.random.Philox(key=[seed, row], counter=[0, 0, copy, segment]))


def words(text: str) -> list[tuple[int, int]]:
    """[begin, end) of every word that may be changed: letters, with apostrophes inside; none inside
    `[...]` or in a token with a digit.
    """
    blocked = [found.span() for found in _LEFT_ALONE.finditer(text)]
    spans, place = [], 0
    for found in _WORD.finditer(text):
        while place < len(blocked) and blocked[place][1] <= found.start():
            place += 1
        if place == len(blocked) or found.end() <= blocked[place][0]:
            spans.append(found.span())
    return spans


def chosen(eligible: int, count: int, rate: float, draw: np.random.Generator) -> np.ndarray:
    """Which of the `eligible` words are replaced, int [N] ascending, so that on average `rate` of
    all `count` words are; fewer where there are not as many.
    """
    wanted = int(np.floor(rate * count + draw.random()))  # of short texts too, on average
    return np.sort(draw.permutation(eligible)[: min(wanted, eligible)])


def replaced(text: str, lexicon: Lexicon, rate: float, draw: np.random.Generator) -> str:
    """The text with synonyms in the place of some words.

    Args:
        text: any.
        lexicon: where synonyms come from.
        rate: share of the words (`words`) that are replaced, as far as so many have synonyms.
        draw: used up by this text.
    """
    spans = words(text)
    options = [(span, found) for span in spans if (found := lexicon.of(text, *span))]
    changes = []
    for place in chosen(len(options), len(spans), rate, draw):
        span, found = options[place]
        changes.append((span, found[draw.integers(len(found))]))
    return substituted(text, changes)


def substituted(text: str, changes: list[tuple[tuple[int, int], str]]) -> str:
    """The text with each stretch, in order, replaced."""
    parts, before = [], 0
    for (begin, end), new in changes:
        parts += [text[before:begin], new]
        before = end
    return "".join([*parts, text[before:]])


def with_case_of(new: str, old: str) -> str:
    """`new`, with a capital where `old` begins with one."""
    return new[0].upper() + new[1:] if _capitalised(old) else new


def read_lexicon(path: pathlib.Path) -> Lexicon:
    """Synonyms out of a WordNet folder, or out of a TSV: a word, a tab, synonyms with `|` between.

    Raises:
        UserError: no such file, a line that is not of this form, or no synonyms at all.
    """
    if path.is_dir():
        found = _wordnet(path)
    else:
        found = {}
        for line, (word, cell) in _pairs(path, "a word, a tab, and synonyms with | between"):
            others = dict.fromkeys(part.strip() for part in cell.split(BETWEEN_SYNONYMS))
            others = [one for one in others if one and one != word]
            if not others:
                raise UserError(
                    f"{path}, line {line}: {word!r} has no synonym but itself; add one or take the "
                    "line out."
                )
            # A word may have several lines.
            found[word] = tuple(dict.fromkeys((*found.get(word, ()), *others)))
    if not found:
        raise UserError(
            f"augmentation.synonyms={path} holds no word with a synonym; give a folder with "
            f"{_SYNSETS} and {_LEMMAS}, or a TSV of a word and its synonyms."
        )
    return Lexicon(found)


def read_paraphrases(path: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Paraphrases of each text out of a TSV; a text may have several lines. White space does not
    count (`plain`).

    Raises:
        UserError: no such file, a line that is not of this form, or none at all.
    """
    found: dict[str, tuple[str, ...]] = {}
    for _, (text, other) in _pairs(path, "a text, a tab, and its paraphrase"):
        found[plain(text)] = tuple(dict.fromkeys((*found.get(plain(text), ()), other)))
    if not found:
        raise UserError(
            f"augmentation.paraphrases={path} holds no pair; give a TSV of a text and its "
            "paraphrase."
        )
    return found


def plain(text: str) -> str:
    """The text as paraphrases are looked up: all white space one space."""
    return " ".join(text.split())


def _begins_sentence(text: str, place: int) -> bool:
    before = text[:place].rstrip(_OPENING)
    return not before or before.endswith(_SENTENCE_ENDS)


def _capitalised(word: str) -> bool:
    """Whether a word has one capital, its first letter: not `USA`, not `iPhone`."""
    return word[0].isupper() and (word[1:].islower() or len(word) == 1)


def _wordnet(folder: pathlib.Path) -> dict[str, tuple[str, ...]]:
    members = {
        cells[0]: cells[3].split(BETWEEN_SYNONYMS)
        for cells in _table(folder / _SYNSETS, ("synset", "pos", "lexfile", "members"))
    }
    senses: dict[str, list[list[str]]] = collections.defaultdict(list)  # of each part of speech
    for lemma, _, synsets, *_ in _table(folder / _LEMMAS, ("lemma", "pos")):
        senses[lemma].append(synsets.split(BETWEEN_SYNONYMS))
    found = {}
    for word, parts in senses.items():
        *others, most = sorted(parts, key=len)
        if len(most) < _DOMINANT * sum(map(len, others)):
            continue
        if not _usable(word) or _inflected(word, senses.__contains__):
            continue
        others = tuple(
            one
            for one in members.get(most[0], ())
            if one != word
            and _usable(one)
            and any(part[0] == most[0] for part in senses.get(one, ()))
        )
        if others:
            found[word] = others
    return found


def _usable(word: str) -> bool:
    return bool(_PLAIN.fullmatch(word)) and word not in _GRAMMAR


def _inflected(word: str, known: Callable[[object], bool]) -> bool:
    """Whether a word may be a plural, past or -ing form of a known one."""
    stems = []
    for ending, others in (
        ("s", ("",)),
        ("es", ("",)),
        ("ies", ("y",)),
        ("ed", ("", "e")),
        ("ied", ("y",)),
        ("ing", ("", "e")),
        ("men", ("man",)),
    ):
        if word.endswith(ending) and not word.endswith("ss"):
            stem = word.removesuffix(ending)
            stems += [stem + other for other in others]
            if len(stem) > 2 and stem[-1] == stem[-2]:  # planned, running
                stems.append(stem[:-1])
    return any(len(stem) > 1 and known(stem) for stem in stems)


def _table(path: pathlib.Path, begin: tuple[str, ...]) -> Iterator[list[str]]:
    """Cells of a compressed table's lines, its header left out."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            header = next(file, "").rstrip("\n").split("\t")
            if tuple(header[: len(begin)]) != begin:
                raise UserError(
                    f"{path}, line 1: the columns are {', '.join(header)[:120]!r}; they must begin "
                    f"with {', '.join(begin)}."
                )
            for line, text in enumerate(file, start=2):
                cells = text.rstrip("\n").split("\t")
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}, line {line}: {len(cells)} columns, but {len(header)} in the "
                        "header; the file is damaged."
                    )
                yield cells
    except (OSError, EOFError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} cannot be read: {said}; a WordNet folder holds {_SYNSETS} and {_LEMMAS}."
        ) from None


def _pairs(path: pathlib.Path, form: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """(line, two cells) of a file without a header; blank lines are passed over."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 2 or not all(cells):
            raise UserError(f"{path}, line {number}: {line.strip()[:80]!r} is not {form}.")
        yield number, (cells[0], cells[1])
