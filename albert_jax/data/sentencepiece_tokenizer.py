"""ALBERT's tokenizer: normalisation, a SentencePiece unigram model, Google's digit-comma rule.

In:  the bytes of a `.model` file; or texts to train one on.
Out: a `Tokenizer` whose ids are those of the released code; or the bytes of a model.

This is the only module that imports sentencepiece.

Sources: google-research/albert `tokenization.py` (`encode_pieces`), its README (training settings);
Kudo 2018, arXiv:1804.10959 (unigram language model).
Shapes: T tokens, S texts, V vocabulary.
"""

import io
import itertools
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from albert_jax.data import tokenizer
from albert_jax.errors import UserError

WORD_BOUNDARY = "\u2581"  # how SentencePiece writes the space before a word

_USER_DEFINED_PIECES = ["(", ")", '"', "-", ".", "\u2013", "\u00a3", "\u20ac"]
# Longer ones are cut when a vocabulary is trained; SentencePiece would leave them out.
_LONGEST_TRAINING_TEXT = 4000  # bytes


def read_model(path: str | Path, content: bytes) -> sentencepiece.SentencePieceProcessor:
    """The model in a file's bytes.

    Raises:
        UserError: it is none.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError:
        raise UserError(
            f"tokenizer {path} is not a SentencePiece model; "
            "give a .model, vocab.txt or tokenizer.json file, or --train_tokenizer to make one."
        ) from None
    return processor


def load(
    path: str | Path, content: bytes, normalization: tokenizer.Normalization
) -> tokenizer.Tokenizer:
    """The tokenizer of a SentencePiece model, with the released code's ids.

    Raises:
        UserError: not a SentencePiece model, or one without ALBERT's special pieces.
    """
    return _SentencePieceTokenizer(path, content, normalization)


class _SentencePieceTokenizer(tokenizer.Tokenizer):
    library = "sentencepiece"

    def __init__(
        self, path: str | Path, content: bytes, normalization: tokenizer.Normalization
    ) -> None:
        processor = read_model(path, content)
        pieces = [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]
        super().__init__(path, content, pieces, "albert", normalization)
        self._sentencepiece = processor
        self._without_comma = self._digit_comma_table()
        self._ends_in_digit_comma = np.zeros(self.vocab_size, bool)
        self._ends_in_digit_comma[list(self._without_comma)] = True

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids_T, offsets = super().encode_batch(texts)
        if self._ends_in_digit_comma[ids_T].any():
            return self._apply_digit_comma(ids_T, offsets)
        return ids_T, offsets

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        normalized = tokenizer.normalize_all(texts, self.normalization)
        return self._sentencepiece.Encode(normalized, num_threads=1)

    def _encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        normalized, origins = tokenizer.normalize_with_origins(text, self.normalization)
        found: Any = self._sentencepiece.EncodeAsOffsetMapping(normalized)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for token_id, (begin, end) in zip(found["ids"], found["offsets"], strict=True):
            surface = normalized[begin:end]
            begin = end - len(surface.lstrip(" "))
            parts = [token_id]
            if self._ends_in_digit_comma[token_id]:
                parts = self._without_comma[token_id]
            # From the end: characters that the model drops are before a piece.
            lengths = (len(self.readable(part)) for part in parts[:0:-1])
            begins = itertools.accumulate(lengths, operator.sub, initial=end)
            ids += parts
            edges = [begin, *(max(begin, edge) for edge in reversed([*begins]))]
            spans += [_origin(origins, *span) for span in itertools.pairwise(edges)]
        return ids, spans

    def encode_after_mask(self, text: str) -> list[int]:
        """Without a space between, the first piece behind a mask begins no new word."""
        ids = self.encode(text)
        if not ids or text[0].isspace():
            return ids
        first = self.piece(ids[0])
        if first == WORD_BOUNDARY:
            return ids[1:]
        inner = self._ids.get(first.removeprefix(WORD_BOUNDARY))
        return ids if inner is None else [inner, *ids[1:]]

    def readable(self, token_id: int) -> str:
        return self.piece(token_id).replace(WORD_BOUNDARY, "")

    def decode(self, ids: Iterable[int]) -> str:
        return self._sentencepiece.Decode([int(token_id) for token_id in ids])

    def _starts_word(self, piece: str) -> bool:
        return tokenizer.starts_sentencepiece_word(piece)

    def _more_control(self) -> list[int]:
        model = self._sentencepiece
        return [i for i in range(self.vocab_size) if model.IsControl(i) or model.IsUnused(i)]

    def _digit_comma_table(self) -> dict[int, list[int]]:
        """For each piece like `▁2000,` the ids that stand for it: those of the number, then the
        comma's.

        Source: google-research/albert `tokenization.py`, `encode_pieces`.
        """
        processor = self._sentencepiece
        table = {}
        for token_id, piece in enumerate(self._pieces):
            if len(piece) < 2 or piece[-1] != "," or not piece[-2].isdigit():
                continue
            number = processor.EncodeAsPieces(piece[:-1].replace(WORD_BOUNDARY, ""))
            if not piece.startswith(WORD_BOUNDARY) and number[0].startswith(WORD_BOUNDARY):
                number[0] = number[0].removeprefix(WORD_BOUNDARY)
            table[token_id] = [processor.PieceToId(p) for p in [*number, ","] if p]
        return table

    def _apply_digit_comma(
        self, ids_T: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same texts with the number-comma pieces replaced; longer than before."""
        places = np.flatnonzero(self._ends_in_digit_comma[ids_T])
        replacements = [self._without_comma[token_id] for token_id in ids_T[places].tolist()]
        sizes = np.fromiter(map(len, replacements), np.int64, len(replacements))
        repeats_T = np.ones(len(ids_T), np.int64)
        repeats_T[places] = sizes
        replaced_T = np.repeat(ids_T, repeats_T)
        moved = tokenizer.offsets(repeats_T)
        within = np.arange(sizes.sum()) - np.repeat(tokenizer.offsets(sizes)[:-1], sizes)
        replaced_T[np.repeat(moved[places], sizes) + within] = list(
            itertools.chain.from_iterable(replacements)
        )
        return replaced_T, moved[offsets]


def _origin(origins: list[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """Where the normalised characters [begin, end) are from."""
    if begin < end:
        return origins[begin][0], origins[end - 1][1]
    place = origins[begin][0] if begin < len(origins) else origins[-1][1]
    return place, place


def train(texts: Iterable[str], vocab_size: int, normalization: tokenizer.Normalization) -> bytes:
    """Trains a unigram model with ALBERT's settings.

    Ids 0 to 4 are `<pad>`, `<unk>`, `[CLS]`, `[SEP]`, `[MASK]`; `( ) " - .`, the en dash, the pound
    and the euro sign are pieces of their own; character coverage 0.99995. Texts are normalised here
    and read once, one at a time. The model is the same whomever it is to be compatible with.

    Args:
        texts: sentences.
        vocab_size: pieces, the special ones included.
        normalization: what the tokenizer will be used with.

    Source: google-research/albert README, "SentencePiece".

    Raises:
        UserError: too little text for `vocab_size`; the message names the largest that is possible.
    """
    model = io.BytesIO()
    failures: list[BaseException] = []

    def normalized() -> Iterator[str]:
        # SentencePiece turns what an iterator raises into an error of its own; keep the real one.
        try:
            yield from _training_texts(texts, normalization)
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
        raise _why_not_trained(str(error), vocab_size) from None
    return model.getvalue()


def _training_texts(texts: Iterable[str], normalization: tokenizer.Normalization) -> Iterator[str]:
    for text in texts:
        text = tokenizer.normalize(text, normalization)
        while len(text.encode()) > _LONGEST_TRAINING_TEXT:
            head, text = text[: _LONGEST_TRAINING_TEXT // 4], text[_LONGEST_TRAINING_TEXT // 4 :]
            yield head
        if text:
            yield text


def _why_not_trained(message: str, vocab_size: int) -> UserError:
    """What SentencePiece's message means to the person who asked for this vocabulary."""
    if largest := re.search(r"value <= (\d+)", message):
        return tokenizer.too_large(vocab_size, int(largest[1]))
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return tokenizer.too_small(vocab_size, int(smallest[1]))
    if "sentences_.empty()" in message:
        return tokenizer.no_text()
    return UserError(
        f"no vocabulary of {vocab_size} pieces can be trained on this text: {message.strip()}"
    )
