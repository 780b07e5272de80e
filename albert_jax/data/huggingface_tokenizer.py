"""BERT's WordPiece, RoBERTa's byte-level BPE, and ALBERT as `transformers` has it: tokenizers that
the `tokenizers` library runs.

In:  the bytes of a `vocab.txt`, of a `tokenizer.json`, or of a SentencePiece model that is to give
     the ids of `transformers`; or texts to train a vocabulary on.
Out: a `Tokenizer`; or the bytes of a `vocab.txt` or `tokenizer.json`.

This is the only module that imports tokenizers. Ids are those of `transformers` 5.23 with the same
file, but for special pieces written in the text, such as `[MASK]` or `<s>`: there they become ids,
here they stay text or are unknown, so that no text can bring in a control piece.

Words, for masking. WordPiece: a piece with `##` continues. Byte-level BPE: a piece that begins with
`Ġ`, which stands for a space, begins a word; so punctuation belongs to the word before it. Unigram:
ALBERT's rule.

Byte-level BPE normalises nothing, and a space belongs to the piece behind it. So a sentence that
follows another is stored with a space before it (`between_sentences`): packed back to back, the ids
of a document's sentences are the ids of the document, its sentences joined by spaces, and only its
first word lacks its `Ġ`, as it does in RoBERTa.

ALBERT's ids, Google's (the usual ones) and those of `transformers` 5.23 (`compatible_with`) from
the same SentencePiece model. They differ
  * at a digit and a comma: `2010,` is cut before the comma in Google's code (`▁2010` `,`) and is
    one piece in transformers where the model has it (`▁2010,`);
  * around ( ) " - . and the dash and currency signs that the models define as pieces: transformers
    cuts the text there before all else, and what follows always begins a word (`u.s.` is `▁u` `.`
    `▁s` `.`, in Google's code `▁u` `.` `s` `.`), while the piece has no `▁` before it;
  * at two backquotes and two apostrophes, which transformers takes for a `"`;
  * at marks that do not combine by Unicode's class (vowel signs of Indic scripts): transformers
    drops all marks, Google's code those of a combining class; and at a capital sigma that ends a
    word, which keeps no form of its own;
  * with `keep_accents`: transformers composes no characters (NFKC) beyond what the model does.
A `tokenizer.json` of an ALBERT model is taken as it is.

Sources: Devlin et al. 2018, arXiv:1810.04805, and google-research/bert `tokenization.py`
(WordPiece); Liu et al. 2019, arXiv:1907.11692, section 4.4 (byte-level BPE); transformers 5.23,
`tokenization_albert.py`, `tokenization_bert.py`, `tokenization_roberta.py`.
Shapes: S texts, V vocabulary.
"""

import collections
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from albert_jax.data import tokenizer
from albert_jax.errors import UserError

# Workers share the cores already.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_CONTINUES = "##"
_UNIGRAM_SPACE, _BYTE_SPACE = "\u2581", "\u0120"  # how a piece writes the space before it
_UNUSED = re.compile(r"\[unused\d+\]|madeupword\d+")  # places left free in published vocabularies
_DIGIT_COMMA = re.compile(r"\d,$")
_OUT_OF_REACH = 100.0  # nats: more than any other way to cut the text can cost
_LEAST_FREQUENCY = 2  # of a pair of pieces that is made one piece
_CHARACTERS_KEPT = 1 << 21  # of words with their ids; some 100 MB
_COVERAGE = 0.99995  # share of the characters that an alphabet holds, as in ALBERT's


def load_wordpiece(
    path: str | Path, content: bytes, normalization: tokenizer.Normalization
) -> tokenizer.Tokenizer:
    """The tokenizer of a `vocab.txt`, a piece a line.

    Text is cut as BERT's BasicTokenizer does: control characters go, CJK characters and punctuation
    stand alone, capitals and accents go unless `normalization` keeps them.

    Raises:
        UserError: not text, or without BERT's special pieces.
    """
    try:
        lines = content.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"tokenizer {path} is not a vocabulary: byte {error.start} is no UTF-8 text; "
            "a vocab.txt has a piece a line."
        ) from None
    # Of a piece that stands there twice, the last counts, as in transformers.
    ids = {piece: token_id for token_id, piece in enumerate(lines)}
    backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=tokenizer.SPECIAL["bert"][1]))
    backend.normalizer = _bert_normalizer(normalization)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=_CONTINUES)
    return _HuggingFaceTokenizer(path, content, backend, "bert")


def load_json(path: str | Path, content: bytes) -> tokenizer.Tokenizer:
    """The tokenizer of a `tokenizer.json`: WordPiece, byte-level BPE or unigram.

    It says itself how text is normalised. What it says of padding, truncation and random merges is
    passed over.

    Raises:
        UserError: not such a file, another kind, or without the special pieces of its family.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing more precise
        raise UserError(
            f"tokenizer {path} is not a tokenizer.json of the tokenizers library: {error}"
        ) from None
    model = backend.model
    if isinstance(model, models.WordPiece) and model.continuing_subword_prefix == _CONTINUES:
        family = "bert"
    elif isinstance(model, models.BPE) and "ByteLevel" in _types(
        json.loads(content).get("pre_tokenizer")
    ):
        family = "roberta"
        model.dropout = None
    elif isinstance(model, models.Unigram):
        family = "albert"
    else:
        raise UserError(
            f"tokenizer {path} is a {type(model).__name__} of another kind; give WordPiece with "
            f"{_CONTINUES}, byte-level BPE or unigram."
        )
    backend.no_padding()
    backend.no_truncation()
    return _HuggingFaceTokenizer(path, content, backend, family)


def load_sentencepiece(
    path: str | Path, content: bytes, normalization: tokenizer.Normalization
) -> tokenizer.Tokenizer:
    """The tokenizer that `transformers` makes of an ALBERT's SentencePiece model.

    Raises:
        UserError: not a unigram model, or without ALBERT's special pieces.
    """
    backend = _unigram(path, content, normalization)
    return _HuggingFaceTokenizer(path, content, backend, "albert", normalization)


def export(spoken: tokenizer.Tokenizer, *, segments: bool, max_length: int) -> dict[str, bytes]:
    """The files, by name, with which `transformers.AutoTokenizer` gives a tokenizer's ids.

    The class is the plain one that takes a `tokenizer.json` as it is: transformers' own
    AlbertTokenizer would put its normalisation in the place of ours. Google's ids are told to it by
    making pieces like `▁2010,` too costly to be used; on 10,900 lines of many kinds one differed,
    where two segmentations have equal scores.

    Args:
        spoken: any tokenizer.
        segments: the model has segment embeddings, so it is given `token_type_ids`.
        max_length: tokens that the model reads at most.
    """
    if isinstance(spoken, _HuggingFaceTokenizer):
        backend = tokenizers.Tokenizer.from_str(spoken.backend.to_str())
    else:
        backend = _unigram(spoken.file_name, spoken.content, spoken.normalization)
    _, _, begin, end, mask = special = tokenizer.SPECIAL[spoken.family]
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(
                piece, lstrip=piece == mask and spoken.mask_takes_space, normalized=False
            )
            for piece in special
        ]
    )
    if spoken.family == "roberta":
        ends = (end, spoken.sep_id), (begin, spoken.cls_id)
        backend.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    else:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}",
            pair=f"{begin} $A {end} $B:1 {end}:1",
            special_tokens=[(begin, spoken.cls_id), (end, spoken.sep_id)],
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=False)),
        "mask_token": mask,
        "bos_token": begin,
        "eos_token": end,
        "model_input_names": ["input_ids", *["token_type_ids"] * segments, "attention_mask"],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    own = {"tokenizer.model": "spiece.model"}.get(spoken.file_name, spoken.file_name)
    return {
        own: spoken.content,
        "tokenizer.json": (backend.to_str(pretty=True) + "\n").encode(),
        "tokenizer_config.json": (json.dumps(config, indent=1) + "\n").encode(),
    }


def _unigram(
    path: str | Path, content: bytes, normalization: tokenizer.Normalization
) -> tokenizers.Tokenizer:
    """A SentencePiece unigram model as the library runs it."""
    # protobuf comes with sentencepiece's own description of the file; the processor does not tell
    # the table of normalisation.
    from sentencepiece import sentencepiece_model_pb2

    from albert_jax.data import sentencepiece_tokenizer

    sentencepiece_tokenizer.read_model(path, content)
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        raise UserError(f"tokenizer {path} is no unigram model, which transformers has for ALBERT.")
    as_google = normalization.compatible_with == "google"
    scores = [
        (
            piece.piece,
            piece.score - _OUT_OF_REACH * (as_google and bool(_DIGIT_COMMA.search(piece.piece))),
        )
        for piece in proto.pieces
    ]
    unknown = tokenizer.SPECIAL["albert"][1]
    unknown_id = next((i for i, (piece, _) in enumerate(scores) if piece == unknown), None)
    backend = tokenizers.Tokenizer(models.Unigram(scores, unk_id=unknown_id, byte_fallback=False))
    steps: list[normalizers.Normalizer] = []
    if not as_google:
        steps += [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not normalization.keep_accents:
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    elif as_google:
        steps.append(normalizers.NFKC())
    if normalization.lower_case:
        steps.append(normalizers.Lowercase())
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=_UNIGRAM_SPACE, prepend_scheme="always"),
        ]
    )
    backend.decoder = decoders.Metaspace(replacement=_UNIGRAM_SPACE, prepend_scheme="always")
    if not as_google:
        defined = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
        backend.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in defined])
    return backend


class _HuggingFaceTokenizer(tokenizer.Tokenizer):
    library = "tokenizers"

    def __init__(
        self,
        path: str | Path,
        content: bytes,
        backend: tokenizers.Tokenizer,
        family: str,
        normalization: tokenizer.Normalization | None = None,
    ) -> None:
        """Takes a backend as it is; without a `normalization`, the backend's steps say it."""
        ids = backend.get_vocab(with_added_tokens=True)
        size = max(ids.values(), default=-1) + 1
        if size > 2 * len(ids):
            raise UserError(
                f"tokenizer {path} has {len(ids)} pieces but ids up to {size - 1}: it is damaged."
            )
        pieces = [""] * size
        for piece, token_id in ids.items():
            pieces[token_id] = piece
        said = json.loads(backend.to_str())
        normalization = normalization or _normalization_of(said["normalizer"])
        super().__init__(path, content, pieces, family, normalization)
        added = backend.get_added_tokens_decoder()
        self.mask_takes_space = self.mask_id in added and added[self.mask_id].lstrip
        self.between_sentences = " " if family == "roberta" else ""
        # Special pieces in text are text. (The name is the library's, and means this.)
        backend.encode_special_tokens = True
        self.backend = backend
        self._added = [token_id for token_id, token in added.items() if token.special]
        self._control_V = self.is_control()
        self._words_alone = _words_stand_alone(family, said)
        self._ids_of_word: dict[str, list[int]] = {}
        self._characters_known = 0

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids_T, offsets = super().encode_batch(texts)
        # A unigram model finds its special pieces in text like any other.
        ids_T[self._control_V[ids_T]] = self.unk_id
        return ids_T, offsets

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Cuts each word once: words come again, and the library takes its time."""
        words_S = [self._words(text) for text in texts]
        known = self._ids_of_word
        if self._characters_known > _CHARACTERS_KEPT:
            known.clear()
            self._characters_known = 0
        new = list(set(itertools.chain.from_iterable(words_S)).difference(known))
        self._characters_known += sum(map(len, new))
        found = self.backend.encode_batch_fast(new, add_special_tokens=False)
        known.update(zip(new, (encoding.ids for encoding in found), strict=True))
        return [
            list(itertools.chain.from_iterable(map(known.__getitem__, words))) for words in words_S
        ]

    def _encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self.backend.encode(text, add_special_tokens=False)
        # The library gives ALBERT's piece for a lone space the first character of the next word.
        space = _UNIGRAM_SPACE if self.family == "albert" else None
        spans = [
            (begin, begin if piece == space else end)
            for piece, (begin, end) in zip(found.tokens, found.offsets, strict=True)
        ]
        return [self.unk_id if self._control_V[i] else i for i in found.ids], spans

    def _words(self, text: str) -> list[str]:
        """Stretches of the text that can be encoded one by one: as a rule, its words."""
        words = text.split()
        if not self._words_alone or not words or " ".join(words) != text.removeprefix(" "):
            return [text]
        if self.between_sentences:
            first = text.startswith(" ")
            return [" " + word if first or i else word for i, word in enumerate(words)]
        return words

    def readable(self, token_id: int) -> str:
        piece = self.piece(token_id)
        if self.family == "bert" or self._control_V[int(token_id)]:
            return piece
        return self.backend.decoder.decode([piece]).strip() or piece

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids if not self._control_V[int(i)]])

    def _starts_word(self, piece: str) -> bool:
        if self.family == "bert":
            return not piece.startswith(_CONTINUES)
        if self.family == "roberta":
            return piece.startswith(_BYTE_SPACE)
        return tokenizer.starts_sentencepiece_word(piece)

    def _more_control(self) -> list[int]:
        unused = [i for i, piece in enumerate(self._pieces) if _UNUSED.fullmatch(piece)]
        return self._added + unused


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, normalization: tokenizer.Normalization
) -> bytes:
    """Trains a WordPiece vocabulary; the bytes of its `vocab.txt`.

    Ids 0 to 4 are `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]`, `[MASK]`; then come the characters that make
    up 0.99995 of the text, each as a word's beginning and with `##`, then what is merged of them.
    Holds all texts in memory. (How BERT's own vocabulary was trained was never released; merging
    the most frequent pair is how the `tokenizers` library does it.)

    Raises:
        UserError: too little text for `vocab_size`; the message names the largest that is possible.
    """
    held = list(texts)
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token=tokenizer.SPECIAL["bert"][1]))
    backend.normalizer = _bert_normalizer(normalization)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts = collections.Counter[str]()
    for text in held:
        counts.update(backend.normalizer.normalize_str(text))
    for space in [character for character in counts if character.isspace()]:
        del counts[space]
    alphabet = _alphabet(counts)
    # The library numbers characters within words as it meets them, in an order that changes from
    # process to process, and equal pairs are merged by number. Pieces that are given come first.
    given = [
        *tokenizer.SPECIAL["bert"],
        *alphabet,
        *(_CONTINUES + character for character in alphabet),
    ]
    _fits(len(alphabet), len(given), vocab_size)
    backend.train_from_iterator(
        held,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=_LEAST_FREQUENCY,
            special_tokens=given,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        ),
    )
    ids = backend.get_vocab(with_added_tokens=False)
    if len(ids) < vocab_size:
        raise tokenizer.too_large(vocab_size, len(ids))
    return "".join(f"{piece}\n" for piece in sorted(ids, key=ids.__getitem__)).encode()


def train_bpe(
    texts: Iterable[str], vocab_size: int, normalization: tokenizer.Normalization
) -> bytes:
    """Trains a byte-level BPE; the bytes of its `tokenizer.json`, which loads as RoBERTa's.

    Ids 0 to 4 are `<s>`, `<pad>`, `</s>`, `<unk>`, `<mask>`; then come the 256 bytes, then what is
    merged of them. Nothing is normalised, whatever `normalization` says.

    Raises:
        UserError: too little text for `vocab_size`; the message names the largest that is possible.
    """
    del normalization
    pad, unknown, begin, end, mask = tokenizer.SPECIAL["roberta"]
    special: list[str | tokenizers.AddedToken] = [begin, pad, end, unknown]
    special.append(tokenizers.AddedToken(mask, lstrip=True, special=True))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    seen = False

    def noticed() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen = seen or bool(text.strip())
            yield text

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_LEAST_FREQUENCY,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(noticed(), trainer)
    _fits(len(alphabet) if seen else 0, len(special) + len(alphabet), vocab_size)
    size = backend.get_vocab_size()
    if size < vocab_size:
        raise tokenizer.too_large(vocab_size, size)
    backend.post_processor = processors.RobertaProcessing(
        (end, special.index(end)), (begin, special.index(begin)), add_prefix_space=False
    )
    return (backend.to_str(pretty=True) + "\n").encode()


def _bert_normalizer(normalization: tokenizer.Normalization) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=True,
        # None: where capitals go, accents go.
        strip_accents=False if normalization.keep_accents else None,
        lowercase=normalization.lower_case,
    )


def _alphabet(counts: collections.Counter[str]) -> list[str]:
    """The most frequent characters, up to `_COVERAGE` of all, in the order of Unicode."""
    wanted = _COVERAGE * counts.total()
    alphabet, covered = [], 0
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted:
            break
        alphabet.append(character)
        covered += count
    return sorted(alphabet)


def _fits(characters: int, given: int, vocab_size: int) -> None:
    """Raises UserError for a text without characters, or with too many of them."""
    if not characters:
        raise tokenizer.no_text()
    if given > vocab_size:
        raise tokenizer.too_small(vocab_size, given)


def _types(step: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """A normalizer or pre-tokenizer as a `tokenizer.json` has it: its steps by their types."""
    found: dict[str, dict[str, Any]] = {}
    waiting = [step] if step else []
    while waiting:
        step = waiting.pop()
        found[step["type"]] = step
        waiting += [*step.get("normalizers", []), *step.get("pretokenizers", [])]
    return found


def _normalization_of(normalizer: dict[str, Any] | None) -> tokenizer.Normalization:
    """What a `tokenizer.json` says is done to capitals and accents."""
    steps = _types(normalizer)
    if bert := steps.get("BertNormalizer"):
        lower, strips = bert["lowercase"], bert["strip_accents"]
        return tokenizer.Normalization(lower, not (lower if strips is None else strips))
    return tokenizer.Normalization("Lowercase" in steps, "StripAccents" not in steps)


def _words_stand_alone(family: str, said: dict[str, Any]) -> bool:
    """Whether the pieces of a word never depend on what lies beyond a single space.

    Args:
        family: of the tokenizer.
        said: its `tokenizer.json`.
    """
    normalizer, before = _types(said["normalizer"]), _types(said["pre_tokenizer"])
    if any(
        not token["special"] and (token["lstrip"] or token["rstrip"] or " " in token["content"])
        for token in said["added_tokens"]
    ):
        return False
    if family == "bert":
        return normalizer.keys() == {"BertNormalizer"} and before.keys() == {"BertPreTokenizer"}
    if family == "roberta":
        # The pattern of GPT-2 ends a stretch before any space between two words.
        return (
            not normalizer and before.keys() == {"ByteLevel"} and before["ByteLevel"]["use_regex"]
        )
    # A mark behind a space could be composed with it.
    return "StripAccents" in normalizer and before.keys() == {
        "Sequence",
        "WhitespaceSplit",
        "Metaspace",
    }
