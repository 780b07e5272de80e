"""Text to token ids and back: normalisation, then SentencePiece, then ALBERT's digit-comma rule.

In:  text as people write it.
Out: ids of a SentencePiece unigram model, without special tokens.

The same `Normalization` and the same functions serve preparation, fine-tuning and inference, so a
model never meets text that was cut otherwise than the text it was trained on. This is the only
module that imports sentencepiece.

Sources: google-research/albert `tokenization.py` (`preprocess_text`, `encode_pieces`), its README
(training settings); Kudo 2018, arXiv:1804.10959 (unigram language model).
Shapes: T tokens, S texts, V vocabulary.
"""

import dataclasses
import hashlib
import io
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from albert_jax.errors import UserError

_WORD_BOUNDARY = "\u2581"  # how SentencePiece writes the space before a word
_LATIN_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
_REQUIRED_PIECES = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
_USER_DEFINED_PIECES = ["(", ")", '"', "-", ".", "\u2013", "\u00a3", "\u20ac"]
# Longer ones are cut when a vocabulary is trained; SentencePiece would leave them out.
_LONGEST_TRAINING_TEXT = 4000  # bytes
_PORTION = 1 << 19  # characters that are encoded at once


@dataclasses.dataclass(frozen=True)
class Normalization:
    """The options that decide the ids, recorded with every store and model."""

    lower_case: bool = True
    keep_accents: bool = False


def normalize(text: str, options: Normalization) -> str:
    """`text` as the tokenizer wants it: white space collapsed, compatibility forms, accents and
    case taken away.

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


class _WithoutMarks(dict[int, int | None]):
    """A table for `str.translate` that drops combining marks; learns characters as they come."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.combining(chr(code)) else code
        return self[code]


_WITHOUT_MARKS = _WithoutMarks()


class Tokenizer:
    """A SentencePiece model with the normalisation it is used with.

    Attributes:
        normalization: the options that text is normalised with.
        vocab_size: V, number of pieces.
        pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special pieces.
        sha256: hexadecimal hash of the model file.
    """

    def __init__(self, model: bytes, normalization: Normalization) -> None:
        """Takes a model that is known to be one; `load` is the door that checks."""
        self._sentencepiece = sentencepiece.SentencePieceProcessor()
        self._sentencepiece.LoadFromSerializedProto(model)
        self.normalization = normalization
        self.sha256: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._sentencepiece.GetPieceSize()
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            self._sentencepiece.PieceToId(piece) for piece in _REQUIRED_PIECES
        )
        self._without_comma = self._digit_comma_table()
        self._ends_in_digit_comma = np.zeros(self.vocab_size, bool)
        self._ends_in_digit_comma[list(self._without_comma)] = True

    @classmethod
    def load(cls, path: str | Path, normalization: Normalization) -> "Tokenizer":
        """The tokenizer of a SentencePiece model file.

        Raises:
            UserError: no such file, not a SentencePiece model, or one without `<pad>`, `<unk>`,
                `[CLS]`, `[SEP]` or `[MASK]`.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read: {error.strerror}.") from None
        try:
            tokenizer = cls(model, normalization)
        except RuntimeError:
            raise UserError(
                f"tokenizer {path} is not a SentencePiece model; "
                "give a .model file, or --train_tokenizer to make one."
            ) from None
        processor = tokenizer._sentencepiece
        missing = [
            piece
            for piece in _REQUIRED_PIECES
            if processor.IdToPiece(processor.PieceToId(piece)) != piece
        ]
        if missing:
            raise UserError(
                f"tokenizer {path} has no {' '.join(missing)} among its {tokenizer.vocab_size} "
                "pieces, which pretraining needs. --train_tokenizer makes one that has them."
            )
        return tokenizer

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
            normalized = [normalize(text, self.normalization) for text in portion]
            found = self._sentencepiece.Encode(normalized, num_threads=1)
            lengths.append(np.fromiter(map(len, found), np.int64, len(found)))
            flat = itertools.chain.from_iterable(found)
            ids.append(np.fromiter(flat, np.int32, lengths[-1].sum()))
        ids_T, lengths_S = np.concatenate(ids), np.concatenate(lengths)
        if self._ends_in_digit_comma[ids_T].any():
            return self._apply_digit_comma(ids_T, lengths_S)
        return ids_T, _offsets(lengths_S)

    def piece(self, token_id: int) -> str:
        """The piece of an id, with `▁` where a word begins."""
        return self._sentencepiece.IdToPiece(int(token_id))

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text of ids; control pieces are left out."""
        return self._sentencepiece.Decode([int(token_id) for token_id in ids])

    def word_starts(self) -> np.ndarray:
        """Whether a piece begins a word, bool [V]; the others continue the word before.

        A piece begins one if it starts with `▁` or `<`, or holds anything but the letters a to z:
        punctuation, digits and foreign characters are words of their own.

        Source: google-research/albert `create_pretraining_data.py`, `_is_start_piece_sp`.
        """
        return np.fromiter(
            (
                not _LATIN_LETTERS.issuperset(piece.lower())
                for piece in map(self.piece, range(self.vocab_size))
            ),
            bool,
            self.vocab_size,
        )

    def is_control(self) -> np.ndarray:
        """Whether a piece stands for no text, bool [V]: special, unknown and unused pieces."""
        processor = self._sentencepiece
        special = {processor.PieceToId(piece) for piece in _REQUIRED_PIECES}
        return np.fromiter(
            (
                token_id in special or processor.IsControl(token_id) or processor.IsUnused(token_id)
                for token_id in range(self.vocab_size)
            ),
            bool,
            self.vocab_size,
        )

    def _digit_comma_table(self) -> dict[int, list[int]]:
        """For each piece like `▁2000,` the ids that stand for it: those of the number, then the
        comma's.

        Source: google-research/albert `tokenization.py`, `encode_pieces`.
        """
        processor = self._sentencepiece
        table = {}
        for token_id in range(processor.GetPieceSize()):
            piece = processor.IdToPiece(token_id)
            if len(piece) < 2 or piece[-1] != "," or not piece[-2].isdigit():
                continue
            number = processor.EncodeAsPieces(piece[:-1].replace(_WORD_BOUNDARY, ""))
            if not piece.startswith(_WORD_BOUNDARY) and number[0].startswith(_WORD_BOUNDARY):
                number[0] = number[0].removeprefix(_WORD_BOUNDARY)
            table[token_id] = [processor.PieceToId(p) for p in [*number, ","] if p]
        return table

    def _apply_digit_comma(
        self, ids_T: np.ndarray, lengths_S: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same texts with the number-comma pieces replaced; longer than before."""
        places = np.flatnonzero(self._ends_in_digit_comma[ids_T])
        replacements = [self._without_comma[token_id] for token_id in ids_T[places].tolist()]
        sizes = np.fromiter(map(len, replacements), np.int64, len(replacements))
        repeats_T = np.ones(len(ids_T), np.int64)
        repeats_T[places] = sizes
        replaced_T = np.repeat(ids_T, repeats_T)
        first_T = _offsets(repeats_T)[:-1]
        within = np.arange(sizes.sum()) - np.repeat(_offsets(sizes)[:-1], sizes)
        replaced_T[np.repeat(first_T[places], sizes) + within] = list(
            itertools.chain.from_iterable(replacements)
        )
        return replaced_T, _offsets(repeats_T)[_offsets(lengths_S)]


def train(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int,
    normalization: Normalization,
    *,
    max_texts: int = 10_000_000,
) -> Path:
    """Trains a unigram vocabulary with ALBERT's settings and writes it to `path`.

    Ids 0 to 4 are `<pad>`, `<unk>`, `[CLS]`, `[SEP]`, `[MASK]`; `( ) " - .`, the en dash, the pound
    and the euro sign are pieces of their own; character coverage 0.99995. The same texts give the
    same file, byte for byte. Texts are normalised here and read once, one at a time.

    Args:
        texts: sentences, in an order that makes the first `max_texts` a fair sample.
        path: the file to write.
        vocab_size: pieces, the special ones included.
        normalization: what the tokenizer will be used with.
        max_texts: where reading stops; ALBERT drew as many at random.

    Source: google-research/albert README, "SentencePiece".

    Raises:
        UserError: too little text for `vocab_size`; the message names the largest that is possible.
    """
    model = io.BytesIO()
    failures: list[BaseException] = []

    def normalized() -> Iterator[str]:
        # SentencePiece turns what an iterator raises into an error of its own; keep the real one.
        try:
            yield from itertools.islice(_training_texts(texts, normalization), max_texts)
        except BaseException as error:
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=normalized(),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
            user_defined_symbols=_USER_DEFINED_PIECES,
            character_coverage=0.99995,
            # 0: all it is given. Its own sampling draws anew in each process.
            input_sentence_size=0,
            shuffle_input_sentence=False,
            # The sums of the EM steps depend on how many threads share them; the number of cores
            # must not.
            num_threads=16,
            minloglevel=3,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise UserError(_why_not_trained(str(error), vocab_size)) from None
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(model.getvalue())
    unfinished.replace(path)
    return path


def _training_texts(texts: Iterable[str], normalization: Normalization) -> Iterator[str]:
    for text in texts:
        text = normalize(text, normalization)
        while len(text.encode()) > _LONGEST_TRAINING_TEXT:
            head, text = text[: _LONGEST_TRAINING_TEXT // 4], text[_LONGEST_TRAINING_TEXT // 4 :]
            yield head
        if text:
            yield text


def _why_not_trained(message: str, vocab_size: int) -> str:
    """What SentencePiece's message means to the person who asked for this vocabulary."""
    if largest := re.search(r"value <= (\d+)", message):
        return (
            f"--vocab_size={vocab_size} is too large for this text; the largest it can fill is "
            f"{largest[1]}. Give a smaller one, or more text."
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab_size={vocab_size} is too small for this text; its characters and the special "
            f"pieces alone are {smallest[1]}."
        )
    if "sentences_.empty()" in message:
        return "there is no text in the input to train a vocabulary on."
    return f"no vocabulary of {vocab_size} pieces can be trained on this text: {message.strip()}"


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


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Where each of the pieces of the given lengths begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
