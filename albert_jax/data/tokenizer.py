"""Text to token ids and back: one interface over the tokenizers of ALBERT, BERT and RoBERTa.

In:  text as people write it; a tokenizer's file (a SentencePiece model, a `vocab.txt` of WordPieces
     or a `tokenizer.json`).
Out: ids without special tokens, and what masking must know of the pieces.

    spoken = tokenizer.Tokenizer.load("vocab.txt", tokenizer.Normalization())
    ids_T, offsets = spoken.encode_batch(["One text.", "And another."])

The same tokenizer serves preparation, fine-tuning and inference, so a model never meets text that
was cut otherwise than the text it was trained on. `sentencepiece_tokenizer` and
`huggingface_tokenizer` do the work, each the only one that imports its library; they are imported
where they are needed.

Sources: google-research/albert `tokenization.py` (`preprocess_text`).
Shapes: T tokens, S texts, V vocabulary.
"""

import abc
import dataclasses
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from albert_jax import storage
from albert_jax.errors import UserError

COMPATIBLE_WITH = ("google", "huggingface")
# What `train` can make, and the name of its file; a store and a run keep it under this name.
TRAINED_FILES = {"unigram": "tokenizer.model", "wordpiece": "vocab.txt", "bpe": "tokenizer.json"}
FILES = tuple(TRAINED_FILES.values())
# Beside a tokenizer's file that is kept apart from a store: its options.
NORMALIZATION_FILE = "normalization.json"

# Pieces for padding, the unknown, begin, end and mask, in this order. DistilBERT's are BERT's.
SPECIAL = {
    "albert": ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"),
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
}

_LATIN_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
_PORTION = 1 << 19  # characters that are encoded at once


@dataclasses.dataclass(frozen=True)
class Normalization:
    """The options that decide the ids, recorded with every store and model.

    Attributes:
        lower_case: take capitals away.
        keep_accents: leave accents where they are. A cased WordPiece vocabulary always does.
        compatible_with: whose ids a SentencePiece model gives, "google" (the released code's) or
            "huggingface" (those of `transformers`); `huggingface_tokenizer` says where they differ.
    """

    lower_case: bool = True
    keep_accents: bool = False
    compatible_with: str = "google"

    def record(self) -> dict[str, Any]:
        """The options as JSON; `Normalization(**record)` reads them again.

        The usual `compatible_with` is left out: records are as old as the store format, older than
        that choice, and part of a store's fingerprint.
        """
        record = dataclasses.asdict(self)
        if self.compatible_with == "google":
            del record["compatible_with"]
        return record

    @classmethod
    def beside(cls, tokenizer: Path) -> "Normalization":
        """The options that stand beside a tokenizer's file; the usual ones where none do.

        Raises:
            UserError: a file that is no such options.
        """
        path = tokenizer.with_name(NORMALIZATION_FILE)
        if not path.exists():
            return cls()
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{path} does not say how text is normalised: {error}") from None


def normalize(text: str, options: Normalization) -> str:
    """`text` as ALBERT's SentencePiece models want it: white space collapsed, compatibility forms,
    accents and case taken away.

    In this order, as released: strip and collapse white space; NFKD; drop combining marks (unless
    `keep_accents`, which composes again, NFKC); lower-case (unless `lower_case` is off).

    Source: google-research/albert `tokenization.py`, `preprocess_text`; `keep_accents` is ours.
    """
    text = " ".join(text.split())
    if not text.isascii():
        if options.keep_accents:
            text = unicodedata.normalize("NFKC", text)
        else:
            text = unicodedata.normalize("NFKD", text).translate(_WITHOUT_MARKS)
    return text.lower() if options.lower_case else text


def normalize_all(texts: Sequence[str], options: Normalization) -> list[str]:
    """`normalize` of each text; those of ASCII with their white space collapsed already, in one go.

    A call for each sentence would cost a fifth of what its encoding does.
    """
    plain = [text for text in texts if text.isascii()]
    joined = "\n".join(plain)
    if not _is_collapsed(joined, len(plain)):
        return [normalize(text, options) for text in texts]
    # No rule for small letters of ASCII looks at its neighbours.
    done = iter((joined.lower() if options.lower_case else joined).split("\n"))
    return [next(done) if text.isascii() else normalize(text, options) for text in texts]


def _is_collapsed(joined: str, count: int) -> bool:
    """Whether texts of ASCII, joined by line feeds, are as `" ".join(text.split())` leaves them."""
    content = joined.encode()
    return (
        content.count(b"\n") == max(count - 1, 0)
        and len(content.translate(None, b"\t\v\f\r\x1c\x1d\x1e\x1f")) == len(content)
        and b"  " not in content
        and b"\n " not in content
        and b" \n" not in content
        and not content.startswith(b" ")
        and not content.endswith(b" ")
    )


class _WithoutMarks(dict[int, int | None]):
    """A table for `str.translate` that drops combining marks; learns characters as they come."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.combining(chr(code)) else code
        return self[code]


_WITHOUT_MARKS = _WithoutMarks()


def normalize_with_origins(text: str, options: Normalization) -> tuple[str, list[tuple[int, int]]]:
    """`normalize`, and the [begin, end) characters of `text` that each of its characters is of."""
    form = "NFKC" if options.keep_accents else "NFKD"
    origins: list[tuple[int, int]] = []
    before = None  # where the last word ends
    for word in re.finditer(r"\S+", text):
        if before is not None:
            origins.append((before, word.start()))
        before = word.end()
        if word[0].isascii():
            origins += [(place, place + 1) for place in range(*word.span())]
            continue
        for begin, end in _normalized_alone(text, word.start(), word.end(), form):
            made = text[begin:end]
            if not made.isascii():
                made = unicodedata.normalize(form, made)
                if not options.keep_accents:
                    made = made.translate(_WITHOUT_MARKS)
            # No neighbour changes how many characters the small letters of one are.
            length = sum(map(len, map(str.lower, made))) if options.lower_case else len(made)
            origins += [(begin, end)] * length
    normalized = normalize(text, options)
    assert len(normalized) == len(origins), text
    return normalized, origins


def _normalized_alone(text: str, begin: int, end: int, form: str) -> Iterator[tuple[int, int]]:
    """The stretches of `text[begin:end]` whose normal forms, put together, are that of the whole.

    Without marks they are characters. A character is composed with those before it where it is a
    mark, or where both together do not have the forms of each (Korean letters).
    """
    for place in range(begin + 1, end):
        if form == "NFKC" and not text[place].isascii():
            ours, before = (
                unicodedata.normalize(form, part) for part in (text[place], text[begin:place])
            )
            if unicodedata.combining(unicodedata.normalize("NFKD", text[place])[0]) or (
                unicodedata.normalize(form, text[begin : place + 1]) != before + ours
            ):
                continue
        yield begin, place
        begin = place
    yield begin, end


class Tokenizer(abc.ABC):
    """A vocabulary with the normalisation it is used with; `load` makes one of a file.

    Attributes:
        family: "albert", "bert" or "roberta".
        normalization: the options that text is normalised with.
        vocab_size: V, number of pieces.
        pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special pieces.
        mask_token: how the mask is written: `[MASK]` or `<mask>`.
        mask_takes_space: a mask stands for its word and the space before it.
        between_sentences: what joins a sentence to the one before it, so that the ids of sentences,
            packed back to back, are the ids of their text: a space where spaces belong to pieces.
        content: the file's bytes.
        file_name: what a store and a run call the file.
        library: the package that decides the ids, beside the file.
        sha256: hexadecimal hash of the file.
    """

    mask_takes_space: bool = False
    between_sentences: str = ""
    library: str

    def __init__(
        self,
        path: str | Path,
        content: bytes,
        pieces: Sequence[str],
        family: str,
        normalization: Normalization,
    ) -> None:
        """Takes what is common to all.

        Args:
            path: the file, for its name.
            content: the file's bytes.
            pieces: all pieces by id; "" where an id has none.
            family: whose special pieces there must be.
            normalization: the options in force.

        Raises:
            UserError: a special piece is missing.
        """
        ids = {piece: token_id for token_id, piece in enumerate(pieces) if piece}
        special = SPECIAL[family]
        missing = [piece for piece in special if piece not in ids]
        if missing:
            raise UserError(
                f"tokenizer {path} has no {' '.join(missing)} among its {len(pieces)} pieces, "
                "which pretraining needs. --train_tokenizer makes one that has them."
            )
        self.family = family
        self.normalization = normalization
        self.vocab_size = len(pieces)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            ids[piece] for piece in special
        )
        self.mask_token = special[-1]
        self.content = content
        self.file_name = file_name(path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._pieces = tuple(pieces)
        self._ids = ids

    @staticmethod
    def load(path: str | Path, normalization: Normalization) -> "Tokenizer":
        """The tokenizer in a file: `.txt` is WordPiece, `.json` is of the `tokenizers` library, and
        everything else a SentencePiece model.

        Args:
            path: the file, here or in a bucket.
            normalization: how text is normalised; a `.json` file says that itself.

        Raises:
            UserError: no such file, one that is not what its name says, or one without the special
                pieces of its family.
        """
        try:
            content = storage.content(path)
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read: {error.strerror}.") from None
        if file_name(path) == TRAINED_FILES["unigram"]:
            if normalization.compatible_with == "google":
                from albert_jax.data import sentencepiece_tokenizer

                return sentencepiece_tokenizer.load(path, content, normalization)
            from albert_jax.data import huggingface_tokenizer

            return huggingface_tokenizer.load_sentencepiece(path, content, normalization)
        if normalization.compatible_with != "google":
            raise UserError(
                f"--compatible_with={normalization.compatible_with} is for SentencePiece models; "
                f"{path} gives the same ids in transformers anyway."
            )
        from albert_jax.data import huggingface_tokenizer

        if file_name(path) == TRAINED_FILES["wordpiece"]:
            return huggingface_tokenizer.load_wordpiece(path, content, normalization)
        return huggingface_tokenizer.load_json(path, content)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, normalised first; no special tokens."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts at once, in the calling thread.

        Returns:
            ids int32 [T], all texts one behind the other, and offsets int64 [S+1] into them; text
            i is `ids[offsets[i]:offsets[i + 1]]`.
        """
        ids, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for portion in _portions(texts):
            found = self._encode(portion)
            lengths.append(np.fromiter(map(len, found), np.int64, len(found)))
            flat = itertools.chain.from_iterable(found)
            ids.append(np.fromiter(flat, np.int32, lengths[-1].sum()))
        return np.concatenate(ids), offsets(np.concatenate(lengths))

    @abc.abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode`, and the [begin, end) characters of `text` that each stands for.

        Of a character of several pieces, each of them has the whole. White space and what cannot be
        seen is at no end of a span, what normalisation drops is with its neighbours in the same
        word (marks with the one before), and a piece that stands for nothing has an empty span at
        its place.
        """
        ids, spans = self._encode_with_spans(text)
        return ids, _with_dropped(text, [_without_blanks(text, *span) for span in spans])

    @abc.abstractmethod
    def _encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and spans as the library has them, of the text as it was given."""

    def encode_after_mask(self, text: str) -> list[int]:
        """Ids of text that goes on right behind a mask."""
        return self.encode(text)

    def piece(self, token_id: int) -> str:
        """The piece of an id, with the mark it has where a word begins or goes on."""
        return self._pieces[int(token_id)]

    @abc.abstractmethod
    def readable(self, token_id: int) -> str:
        """The piece of an id as people read it; `##` stays, to tell it from a word."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Readable text of ids; control pieces are left out."""

    @abc.abstractmethod
    def _starts_word(self, piece: str) -> bool:
        """Whether a piece begins a word."""

    def word_starts(self) -> np.ndarray:
        """Whether a piece begins a word, bool [V]; the others continue the word before.

        What a word is where a script has no spaces is the families' own rule. ALBERT: any piece
        with another character than a to z is a word, so Chinese, Japanese and Thai are masked by
        pieces, which the vocabulary makes of one or more characters, and so are the inner pieces of
        words with a Cyrillic letter or an umlaut. BERT: each ideograph is a word, as it is cut out
        before pieces are looked for; kana, Hangul and Thai between spaces are one. RoBERTa: all
        between two spaces is one word, a Chinese clause too, which seldom fits the budget of masks:
        leave `data.whole_word_masking` off there, as its authors did.
        """
        starts = (self._starts_word(piece) for piece in self._pieces)
        return np.fromiter(starts, bool, self.vocab_size)

    def is_control(self) -> np.ndarray:
        """Whether a piece stands for no text, bool [V]: special, unknown and unused pieces."""
        control_V = np.fromiter((not piece for piece in self._pieces), bool, self.vocab_size)
        special = [self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id]
        control_V[[*special, *self._more_control()]] = True
        return control_V

    @abc.abstractmethod
    def _more_control(self) -> list[int]:
        """Ids of control pieces beside the five special ones."""


def file_name(path: str | Path) -> str:
    """What a store and a run call a tokenizer's file."""
    by_suffix = {Path(name).suffix: name for name in FILES}
    return by_suffix.get(Path(path).suffix, TRAINED_FILES["unigram"])


def starts_sentencepiece_word(piece: str) -> bool:
    """ALBERT's rule: a piece begins a word if it starts with `▁` or `<`, or holds anything but the
    letters a to z. Punctuation, digits and foreign characters are words of their own.

    Source: google-research/albert `create_pretraining_data.py`, `_is_start_piece_sp`.
    """
    return not _LATIN_LETTERS.issuperset(piece.lower())


def train(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int,
    normalization: Normalization,
    *,
    kind: str = "unigram",
    max_texts: int = 10_000_000,
) -> Path:
    """Trains a vocabulary and writes its file; the same texts give the same file, byte for byte.

    Args:
        texts: sentences, in an order that makes the first `max_texts` a fair sample.
        path: the file to write.
        vocab_size: pieces, the special ones included.
        normalization: what the tokenizer will be used with; "bpe" knows none.
        kind: "unigram" (SentencePiece, as ALBERT), "wordpiece" (as BERT) or "bpe" (of bytes, as
            RoBERTa).
        max_texts: where reading stops; ALBERT drew as many at random.

    Raises:
        UserError: too little text for `vocab_size`; the message names the largest that is possible.
    """
    chosen = itertools.islice(texts, max_texts)
    if kind == "unigram":
        from albert_jax.data import sentencepiece_tokenizer

        content = sentencepiece_tokenizer.train(chosen, vocab_size, normalization)
    else:
        from albert_jax.data import huggingface_tokenizer

        trainer = {
            "wordpiece": huggingface_tokenizer.train_wordpiece,
            "bpe": huggingface_tokenizer.train_bpe,
        }[kind]
        content = trainer(chosen, vocab_size, normalization)
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)
    return path


def too_large(vocab_size: int, largest: int) -> UserError:
    """The error for a vocabulary that the text cannot fill."""
    return UserError(
        f"--vocab_size={vocab_size} is too large for this text; the largest it can fill is "
        f"{largest}. Give a smaller one, or more text."
    )


def too_small(vocab_size: int, least: int) -> UserError:
    """The error for a vocabulary without room for its alphabet."""
    return UserError(
        f"--vocab_size={vocab_size} is too small for this text; its characters and the special "
        f"pieces alone are {least}."
    )


def no_text() -> UserError:
    """The error for a vocabulary of nothing."""
    return UserError("there is no text in the input to train a vocabulary on.")


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Where each of the stretches of the given lengths begins, and where the last one ends."""
    places = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=places[1:])
    return places


def _is_blank(character: str) -> bool:
    """White space, control characters, and what has no width."""
    return character.isspace() or unicodedata.category(character) in ("Cc", "Cf")


def _without_blanks(text: str, begin: int, end: int) -> tuple[int, int]:
    while begin < end and _is_blank(text[begin]):
        begin += 1
    while begin < end and _is_blank(text[end - 1]):
        end -= 1
    return begin, end


def _with_dropped(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans made longer by visible characters that are in none."""
    spans = list(spans)
    last, covered = None, 0  # the piece before that stands for something, and where it ends
    for number, (begin, end) in enumerate([*spans, (len(text), len(text))]):
        is_end = number == len(spans)
        if begin == end and not is_end:
            continue
        # Nothing lies between most pieces.
        if (gap := text[covered:begin]) and not gap.isspace():
            visible = "".join(" " if _is_blank(character) else "x" for character in gap)
            left = len(visible) - len(visible.lstrip("x")) if last is not None else 0
            if left == len(gap) and not is_end:  # one word: its first marks, and no more
                left = next((i for i, c in enumerate(gap) if not unicodedata.combining(c)), left)
            if last is not None:
                spans[last] = spans[last][0], covered + left
            if not is_end:
                behind = visible[left:]
                begin -= len(behind) - len(behind.rstrip("x"))
                spans[number] = begin, end
            # What stands for nothing stays in order.
            for i in range(0 if last is None else last + 1, number):
                place = min(spans[i][0], begin)
                spans[i] = place, place
        last, covered = number, max(covered, end)
    return spans


def _portions(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in portions: as lists of Python numbers, ids take ten times their room."""
    start = characters = 0
    for index, text in enumerate(texts):
        characters += len(text)
        if characters >= _PORTION:
            yield texts[start : index + 1]
            start, characters = index + 1, 0
    if start < len(texts):
        yield texts[start:]
