"""Pretraining examples straight out of a token store: chunks, pairs, masks, a batch a call.

In:  the shards of a split (`store.Shard`, memory-mapped and read in place), what masking must know
     of the tokenizer (`Vocabulary`), and `ExampleOptions`.
Out: batches as NumPy arrays, ready for the device.

Promise: example i of a run is a pure function of (shards, options, i). With N chunks in the split,
epoch = i div N and slot = i mod N; permutations keyed by (seed, epoch) map slots to chunks, so an
epoch visits every chunk once; a generator keyed by (seed, epoch, chunk) makes the example's
choices. There is no state to save, and nothing depends on batch size, hosts or threads.
With `packing` the same holds of rows, which hold several chunks: N is then their number.

All work is done by compiled functions (`example_rows`), and one call makes a batch. Below is the
whole specification; `tests/data/slow_examples.py` is written from it in plain Python.

Random numbers. SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195) used as a
counter-based generator, unsigned 64-bit arithmetic throughout:
    key(seed, purpose, a, b) = mix(mix(mix(mix(seed) ^ purpose) ^ a) ^ b)
    draw k of a stream       = mix(key + (k + 1) * GAMMA),  k = 0, 1, ...
    below(n)                 = ((draw >> 32) * n) >> 32, in [0, n); takes one draw.
Purposes: DOCUMENT (a document's chunks; a = its number in the split, b = 0), ORDER (an epoch's
permutation; a = epoch, b = 0), EXAMPLE (a = epoch, b = the chunk's number in the split), OTHER (a
= the chunk's number, b = 0; with packing only), SHARDS (an epoch's permutation of shards; a =
epoch, b = 0), WINDOW (a window's permutation; a = epoch, b = the window's number), MIX (see
`mixture`).

Order. `global`: the chunk at a slot is what ORDER's permutation of the N chunks has there.
`shard`, for a corpus that is larger than the disk: the K shards in the order of SHARDS' permutation
are cut into windows of `shuffle_shards`, the last of what is left; a window's slots are as many as
its chunks, and the chunk at its slot t is number u of its chunks, laid one shard behind the other
in that order, where WINDOW's permutation of them has u at t. So a few shards are read at a time,
all of each once an epoch.

Permutation of N things. A Feistel network on pairs with cycle walking (Black and Rogaway 2002,
"Ciphers with Arbitrary Finite Domains", sections 3 and 4): with w = ceil(sqrt(N)), x is the pair
(left, right) = (x div w, x mod w). Rounds r = 0..7 in turn: left += F(r, right) mod w when r is
even, right += F(r, left) mod w when it is odd; F(r, v) is below(w) computed from
mix((key + (r + 1) * GAMMA) ^ v) as the draw. All rounds are repeated until x < N.

Chunks, the same in every epoch. room = L - 3 (L - 2 for `none`).
    `sop`, `nsp`: a document's stream draws below(2**32); if that is less than
    round(short_seq_prob * 2**32), its target is 2 + below(room - 1) tokens, else room. Sentences
    are gathered until they reach the target or the document ends. `sop`: that is a chunk.
    `nsp`: the same stream goes on: of k > 1 sentences, the first 1 + below(k - 1) are segment A,
    and if then below(2) = 1, they alone are the chunk, marked "random next", and the others go back
    to begin the next one. A single sentence is always "random next", with no draw.
    `none` (FULL-SENTENCES of Liu et al. 2019, arXiv:1907.11692, section 4.2): whole sentences of a
    shard are packed up to room; where a chunk goes on into another document, a separator takes one
    place. A sentence longer than room is cut into pieces that fill the chunk at hand and as many
    more as it takes. Nothing is lost; `short_seq_prob` plays no part.

Example: the draws of its stream, in this order.
    1. Pair, `sop`: of k > 1 sentences, the first 1 + below(k - 1) are A. A single one: with
       "random_next", B is a random other text (2) and the label is 1; with "split", A is its first
       1 + below(n - 1) of n tokens (of n = 1: that token, no draw, and B is empty). But for
       "random_next", below(2) is then the label, and at 1 A and B change places.
       `nsp`: the chunk knows A; where it is marked "random next", B is a random other text and the
       label 1, else B is the rest of the chunk and the label 0.
    2. Random other text: document below(documents in the split), or with `shard` that of the
       chunk's own shard, below(documents in it); drawn again until it is another document that is
       not empty; begin at sentence below(sentences in it) and gather until target - len(A) tokens
       are reached (one sentence at least) or the document ends. With packing these draws are taken
       from the chunk's stream OTHER: the same text in every epoch, so that the length of every pair
       is known before rows are put together.
    3. While A and B hold more than room tokens: the longer (B when equal) loses its first token
       where below(2) = 0, else its last.
    4. Masks, never of [CLS] and [SEP]. A word is a piece with `starts_word`, or the first of a
       segment, and the pieces after it that do not start one; without `whole_word_masking` every
       piece is a word (dynamic masking of tokens, as RoBERTa). Budget = min(P, max(1,
       round(masked_lm_prob * length))) pieces, Python's round (halves to even, as the released
       code). Words are visited in random order: with W words in text order, visit v = 0, 1, ...
       swaps entry v with entry v + below(W - v) and takes it. A word that is masked already is
       passed over, with no draw. Else its n-gram is drawn: p(n) proportional to 1/n for n up to
       what is left of the segment, as below(sum of M/n), M = lcm(1..ngram), against the running
       sum. While it does not fit in what is left of the budget it loses its last word; if one word
       does not fit, or a word of it is masked, the visit ends. No visit once the budget is spent.
    5. Masked pieces in ascending position: below(10) < 8 becomes [MASK]; 8 stays; 9 becomes piece
       number below(pieces that are not control) of those that are not control pieces.
The row is filled up with the vocabulary's own piece for padding, everything else with 0.

Packing (`sop`, `nsp`): the pairs of a shard, at their lengths after 3, are put into rows by best
fit (see `packing`), by which a row has no more than L places, P masked pieces by the budgets of 4,
and `max_pairs_per_seq` pairs. A row's pairs stand one after another in the order of their chunks,
each with its own [CLS] and [SEP]s, and each as it would be in a row of its own: cut, order and
masks are drawn anew every epoch, which pairs share a row stays.

Sources: Lan et al. 2020, arXiv:1909.11942, sections 3.1 and 4.1; google-research/albert,
create_pretraining_data.py. Departures from the latter: n-grams end at a [SEP]; the first piece of B
does not continue A's last word; near the end of a segment the n-gram law is renormalised; random
pieces are never control pieces; a single sentence can be split.

Shapes: B examples, L sequence length, P masked slots, V vocabulary, N chunks, K shards.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from albert_jax.data import example_rows, nearby, packing, store
from albert_jax.data import order as order_lib
from albert_jax.errors import UserError

if TYPE_CHECKING:
    from albert_jax.data import tokenizer as tokenizer_lib

_SINGLE_SENTENCE = ("split", "random_next")
_MASKED = ("masked_lm_positions", "masked_lm_ids", "masked_lm_weights")
_MANY = 1_000_000  # pairs that tell how much padding there is
_ALIGNMENT_BYTES = 64  # that TensorFlow wants


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What masking must know of a tokenizer.

    Attributes:
        vocab_size: V, pieces.
        cls_id: id of [CLS].
        sep_id: id of [SEP].
        mask_id: id of [MASK].
        starts_word: bool [V], the piece begins a word; others continue the word before them.
        is_control: bool [V], the piece stands for no text ([MASK], <unk>, ...): never drawn.
        pad_id: id that fills up a sequence: 0 in ALBERT and BERT, 1 in RoBERTa.
    """

    vocab_size: int
    cls_id: int
    sep_id: int
    mask_id: int
    starts_word: np.ndarray
    is_control: np.ndarray
    pad_id: int = 0

    @classmethod
    def of(cls, tokenizer: "tokenizer_lib.Tokenizer") -> "Vocabulary":
        """The vocabulary of a tokenizer."""
        return cls(
            vocab_size=tokenizer.vocab_size,
            cls_id=tokenizer.cls_id,
            sep_id=tokenizer.sep_id,
            mask_id=tokenizer.mask_id,
            starts_word=tokenizer.word_starts(),
            is_control=tokenizer.is_control(),
            pad_id=tokenizer.pad_id,
        )


@dataclasses.dataclass(frozen=True)
class ExampleOptions:
    """How text becomes examples; the fields are those of `data.*` and `model.*` in a config."""

    max_seq_length: int  # L, tokens with [CLS] and [SEP]
    max_predictions_per_seq: int  # P
    masked_lm_prob: float  # share of a sequence's tokens to mask, special ones counted
    ngram: int  # longest run of words masked together
    short_seq_prob: float  # share of documents cut to a random shorter length
    seed: int
    sentence_objective: str  # "sop", "nsp" or "none"
    single_sentence: str  # "split" or "random_next"; `sop` only
    whole_word_masking: bool = True  # else every piece is masked on its own
    packing: bool = False  # several pairs in a row; not `none`, whose rows are full anyway
    max_pairs_per_seq: int = 32  # in a row, with packing
    shuffle: str = "global"  # an epoch's order of chunks: of all, or "shard"
    shuffle_shards: int = 8  # whose chunks are mixed with each other; "shard" only

    def __post_init__(self) -> None:
        """Raises UserError for what the builder cannot make: its compiled code checks nothing."""
        rules = (
            ("max_seq_length", self.max_seq_length >= 8, "8 or more"),
            ("max_predictions_per_seq", self.max_predictions_per_seq >= 1, "1 or more"),
            ("masked_lm_prob", 0 < self.masked_lm_prob <= 1, "above 0, at most 1"),
            ("ngram", 1 <= self.ngram <= 10, "from 1 to 10"),
            ("short_seq_prob", 0 <= self.short_seq_prob <= 1, "from 0 to 1"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            (
                "sentence_objective",
                self.sentence_objective in example_rows.OBJECTIVES,
                "sop, nsp or none",
            ),
            ("single_sentence", self.single_sentence in _SINGLE_SENTENCE, "split or random_next"),
            ("packing", not self.packing or self.sentence_objective != "none", "False with none"),
            ("max_pairs_per_seq", self.max_pairs_per_seq >= 1, "1 or more"),
            ("shuffle", self.shuffle in order_lib.SHUFFLES, "global or shard"),
            ("shuffle_shards", self.shuffle_shards >= 1, "1 or more"),
        )
        for name, fits, wanted in rules:
            if not fits:
                raise UserError(f"{name}={getattr(self, name)!r} makes no examples: use {wanted}.")


@dataclasses.dataclass(frozen=True)
class Packing:
    """What packing makes of a split.

    Attributes:
        max_seq_length: L, places of a row.
        pairs: in an epoch; as many rows without packing.
        rows: in an epoch with packing.
        pieces: of all pairs, special ones included.
        squares: sum over the pairs of their squared lengths.
    """

    max_seq_length: int
    pairs: int
    rows: int
    pieces: int
    squares: int

    @property
    def padding_without(self) -> float:
        """Share of padding in rows of one pair each."""
        return 1 - self.pieces / (self.pairs * self.max_seq_length)

    @property
    def padding_with(self) -> float:
        """Share of padding in packed rows."""
        return 1 - self.pieces / (self.rows * self.max_seq_length)


class ExampleBuilder:
    """Builds any examples of a run over one split. Safe to call from many threads at once.

    Args:
        shards: the split's shards, in order; their arrays are read in place at every call.
        vocabulary: of the tokenizer that made the shards.
        options: see `ExampleOptions`.
        tokens: where the shards' tokens come from, with `shuffle="shard"`; the shards' own arrays
            then only say how many there are. None: from the shards.

    Attributes:
        examples_per_epoch: N, the number of chunks in the split; with packing, of rows.

    Raises:
        UserError: the split holds no text, or no second document where one is needed; a shard's
            arrays do not fit together; the vocabulary has no piece to draw.
    """

    def __init__(
        self,
        shards: Sequence[store.Shard],
        vocabulary: Vocabulary,
        options: ExampleOptions,
        tokens: nearby.NearShards | None = None,
    ) -> None:
        self._tokens = tokens
        self._shards = [_contiguous(number, shard) for number, shard in enumerate(shards)]
        self._vocabulary = vocabulary
        self._options = options
        self._rules = _make_rules(vocabulary, options)
        self._corpus = _index(self._shards, self._rules)
        self.examples_per_epoch = int(self._corpus.first_row[-1])
        if not self.examples_per_epoch:
            raise UserError(
                f"the split holds no text: {len(shards)} shards without a single token. "
                "Prepare the store again, with more text or another share for this split."
            )
        needs_other = options.sentence_objective == "nsp" or (
            options.sentence_objective == "sop" and options.single_sentence == "random_next"
        )
        with_text_K = [int(np.count_nonzero(np.diff(shard.documents))) for shard in self._shards]
        if needs_other and sum(with_text_K) < 2:
            raise UserError(
                "the split holds one document, but a second segment has to come from another one. "
                "Use sentence_objective=sop with single_sentence=split, or a store of more "
                "documents."
            )
        by_shard = options.shuffle == "shard"
        if needs_other and by_shard and 1 in with_text_K:
            raise UserError(
                f"shard {with_text_K.index(1)} holds one document, but with shuffle=shard a second "
                "segment has to come from another document of the shard. Use shuffle=global, or "
                "sentence_objective=sop with single_sentence=split."
            )
        self._packing: Packing | None = None
        if options.packing:
            self._corpus, self._packing = self._packed()
            self.examples_per_epoch = self._packing.rows
        window = options.shuffle_shards if by_shard else 0
        self._order = order_lib.Order(self._corpus.first_row, options.seed, window)

    def packing(self) -> Packing:
        """What packing makes of the split, or would make of it. Not of `none`.

        Without packing a large split is judged by its first shards, of a million pairs or more.
        """
        return self._packing or self._packed(_MANY)[1]

    def _packed(self, many: int | None = None) -> tuple[example_rows.Corpus, Packing]:
        """The corpus with its chunks put into rows, those of as many shards as have `many`."""
        corpus, rules, options = self._corpus, self._rules, self._options
        first_row, found = [0], []
        pieces = squares = 0
        for shard in range(len(self._shards)):
            if many is not None and corpus.first_chunk[shard] >= many:
                break
            chunks = corpus.first_chunk[shard + 1] - corpus.first_chunk[shard]
            lengths_C = np.empty(chunks, np.int32)
            example_rows.pair_lengths(corpus, rules, shard, lengths_C)
            found.append(
                packing.pack(
                    lengths_C,
                    rules.budgets,
                    options.max_seq_length,
                    options.max_predictions_per_seq,
                    options.max_pairs_per_seq,
                )
            )
            first_row.append(first_row[-1] + len(found[-1].first_R) - 1)
            pieces += int(lengths_C.sum(dtype=np.int64))
            squares += int(np.square(lengths_C, dtype=np.int64).sum())
        starts = [rows.first_R[:-1] + corpus.first_chunk[shard] for shard, rows in enumerate(found)]
        pairs = int(corpus.first_chunk[len(found)])
        corpus = corpus._replace(
            first_row=np.array(first_row, np.int64),
            row_begin_R=np.concatenate([*starts, [pairs]]),
            row_chunk_N=np.concatenate([rows.sequence_C for rows in found]),
        )
        figures = Packing(options.max_seq_length, pairs, first_row[-1], pieces, squares)
        return corpus, figures

    def batch(self, first: int, last: int, end: int | None = None) -> dict[str, np.ndarray]:
        """Examples [first, last) of the run; from `end` on, rows of padding. Else as `rows`."""
        examples_B = np.arange(first, last, dtype=np.int64)
        if end is not None:
            examples_B[examples_B >= end] = -1
        return self.rows(examples_B)

    def rows(self, examples_B: np.ndarray) -> dict[str, np.ndarray]:
        """The numbered examples of the run, one a row; a negative number makes a row of padding.

        Args:
            examples_B: int64 [B], any numbers in any order; 0 is the first of the run.

        Returns:
            `input_ids` int32 [B, L], padded with the vocabulary's `pad_id`; `token_type_ids`,
            `attention_mask` int32 [B, L], padded with 0; `masked_lm_positions` (ascending),
            `masked_lm_ids` int32 [B, P] and `masked_lm_weights` float32 [B, P], padded with 0;
            `sentence_order_labels` int32 [B] (1 = swapped, or random next), absent when the
            objective is `none`.
            With packing, of S = `max_pairs_per_seq` pairs at most: `sentence_order_labels` int32
            [B, S] and `sentence_order_weights` float32 [B, S], 1 where there is a pair;
            `segment_ids` int32 [B, L], 1, 2, 3, ... on the pairs of a row and 0 on padding;
            `cls_positions` int32 [B, S], where each pair begins, 0-padded.

        Raises:
            UserError: a shard holds an id that the vocabulary does not have.
        """
        B, L, P, S = (
            len(examples_B),
            self._options.max_seq_length,
            self._options.max_predictions_per_seq,
            self._options.max_pairs_per_seq if self._options.packing else 1,
        )
        packed_B = B if self._options.packing else 0
        batch = _empty(
            {
                **_forms(B, L, P),
                "sentence_order_labels": ((B, S), np.int32),
                "sentence_order_weights": ((packed_B, S), np.float32),
                "segment_ids": ((packed_B, L), np.int32),
                "cls_positions": ((packed_B, S), np.int32),
            }
        )
        examples_B = np.ascontiguousarray(examples_B, dtype=np.int64)
        epochs_B, rows_B = self._order.places(examples_B)
        corpus, held = self._corpus, {}
        if self._tokens:
            held = self._tokens.held(*self._order.shards(examples_B))
            tokens_K = corpus.tokens_K.copy()
            for shard, tokens in held.items():
                tokens_K[shard] = tokens.ctypes.data
            corpus = corpus._replace(tokens_K=tokens_K)
        if not example_rows.build(
            corpus, self._rules, epochs_B, rows_B, example_rows.Batch(*batch.values())
        ):
            raise self._unknown_token(held)
        if self._options.packing:
            return batch
        for name in ("sentence_order_weights", "segment_ids", "cls_positions"):
            del batch[name]
        labels_B1 = batch.pop("sentence_order_labels")
        if self._options.sentence_objective != "none":
            batch["sentence_order_labels"] = labels_B1.reshape(B)
        return batch

    def _unknown_token(self, held: Mapping[int, np.ndarray]) -> UserError:
        for number, shard in enumerate(self._shards):
            tokens = held.get(number, shard.tokens)
            unknown = np.flatnonzero(tokens >= self._vocabulary.vocab_size)
            if len(unknown):
                where, token = int(unknown[0]), int(tokens[unknown[0]])
                return UserError(
                    f"shard {number}, token {where} is {token}, but the tokenizer has only "
                    f"{self._vocabulary.vocab_size} pieces: the store was made with another "
                    "tokenizer, or is damaged. Prepare it again."
                )
        raise AssertionError("an unknown token was met, yet no shard holds one")


class Masker:
    """Masks text that is laid in rows already, by the rules of this module (4 and 5).

    The stream of a row is that of the example with its epoch and number, which draws nothing else.

    Args:
        vocabulary: of the tokenizer that made the ids.
        options: those of masking, the length and the seed are looked at.
    """

    def __init__(self, vocabulary: Vocabulary, options: ExampleOptions) -> None:
        self._rules = _make_rules(vocabulary, options)
        self._whole_words = options.whole_word_masking

    def mask(
        self,
        batch: dict[str, np.ndarray],
        starts_word_BL: np.ndarray,
        epochs_B: np.ndarray,
        numbers_B: np.ndarray,
    ) -> None:
        """Masks the rows of a batch of `empty_batch` in place.

        Args:
            batch: `input_ids` without masks and `attention_mask` are read; `input_ids` and the
                three `masked_lm_*` are written. Ids are those of the vocabulary.
            starts_word_BL: bool, the piece at this place begins a word.
            epochs_B: int64.
            numbers_B: int64, of the example in its epoch; the row of a negative one is left alone.
        """
        masked = tuple(batch[name] for name in ("input_ids", *_MASKED))
        lengths_B = batch["attention_mask"].sum(1, dtype=np.int64)
        starts_BL = np.ascontiguousarray(starts_word_BL | (not self._whole_words))
        example_rows.mask_rows(self._rules, *masked, starts_BL, lengths_B, epochs_B, numbers_B)


def empty_batch(B: int, L: int, P: int) -> dict[str, np.ndarray]:
    """The arrays of a batch, with anything in them, where TensorFlow takes them without a copy."""
    return _empty(_forms(B, L, P))


_Forms = dict[str, tuple[tuple[int, ...], type]]


def _forms(B: int, L: int, P: int) -> _Forms:
    return {
        "input_ids": ((B, L), np.int32),
        "token_type_ids": ((B, L), np.int32),
        "attention_mask": ((B, L), np.int32),
        "masked_lm_positions": ((B, P), np.int32),
        "masked_lm_ids": ((B, P), np.int32),
        "masked_lm_weights": ((B, P), np.float32),
        "sentence_order_labels": ((B,), np.int32),
    }


def _empty(forms: _Forms) -> dict[str, np.ndarray]:
    """Arrays as `aligned` makes them, in one piece of memory, which takes less time."""
    ends = [0]
    for shape, dtype in forms.values():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        ends.append(ends[-1] + size + -size % _ALIGNMENT_BYTES)
    memory = aligned((ends[-1],), np.uint8)
    return {
        name: np.ndarray(shape, dtype, memory, begin)
        for (name, (shape, dtype)), begin in zip(forms.items(), ends, strict=False)
    }


def _contiguous(number: int, shard: store.Shard) -> store.Shard:
    """The shard as plain arrays that compiled code may read without looking, or a UserError."""
    if shard.tokens.dtype not in (np.uint16, np.uint32):
        raise UserError(
            f"shard {number}: tokens are {shard.tokens.dtype}, not uint16 or uint32. "
            "Prepare the store again."
        )
    for name, offsets, end, rises, rule in (
        ("sentences", shard.sentences, len(shard.tokens), np.greater, "grow"),
        ("documents", shard.documents, len(shard.sentences) - 1, np.greater_equal, "never fall"),
    ):
        whole = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == end
        if not whole or not np.all(rises(offsets[1:], offsets[:-1])):
            raise UserError(
                f"shard {number}: the offsets in {name} must begin with 0, end with {end} and "
                f"{rule}: the store is damaged. Prepare it again."
            )
    return store.Shard(
        # What stands for tokens that are elsewhere has no strides, and takes no memory.
        tokens=shard.tokens
        if not any(shard.tokens.strides)
        else np.ascontiguousarray(shard.tokens),
        sentences=np.ascontiguousarray(shard.sentences, dtype=np.int64),
        documents=np.ascontiguousarray(shard.documents, dtype=np.int64),
    )


def _make_rules(vocabulary: Vocabulary, options: ExampleOptions) -> example_rows.Rules:
    V, L = vocabulary.vocab_size, options.max_seq_length
    if len(vocabulary.starts_word) != V or len(vocabulary.is_control) != V:
        raise ValueError(
            f"vocab_size={V}, but starts_word has {len(vocabulary.starts_word)} entries and "
            f"is_control {len(vocabulary.is_control)}."
        )
    replacements = np.flatnonzero(~vocabulary.is_control).astype(np.int32)
    if not len(replacements):
        raise UserError(f"all {V} pieces of the tokenizer are control pieces: train another one.")
    starts_V = vocabulary.starts_word | (not options.whole_word_masking)
    piece_kind_V = np.where(starts_V, example_rows.STARTS, example_rows.CONTINUES).astype(np.uint8)
    piece_kind_V[[vocabulary.cls_id, vocabulary.sep_id]] = example_rows.SPECIAL
    multiple = math.lcm(*range(1, options.ngram + 1))
    shares = [0] + [multiple // n for n in range(1, options.ngram + 1)]
    return example_rows.Rules(
        objective=example_rows.OBJECTIVES[options.sentence_objective],
        random_next=options.single_sentence == "random_next",
        by_shard=options.shuffle == "shard",
        room=L - (2 if options.sentence_objective == "none" else 3),
        seed=np.uint64(options.seed),
        short_below=round(options.short_seq_prob * 2**32),
        cls_id=vocabulary.cls_id,
        sep_id=vocabulary.sep_id,
        mask_id=vocabulary.mask_id,
        pad_id=vocabulary.pad_id,
        piece_kind_V=piece_kind_V,
        replacements=replacements,
        budgets=np.array(
            [
                min(options.max_predictions_per_seq, max(1, round(n * options.masked_lm_prob)))
                for n in range(L + 1)
            ]
        ),
        ngram_law=np.cumsum(shares),
        packing=options.packing,
    )


def _index(shards: Sequence[store.Shard], rules: example_rows.Rules) -> example_rows.Corpus:
    """Finds the chunks of all shards: one pass to count them, one to write them down."""
    K = len(shards)
    first_document = np.cumsum([0] + [len(shard.documents) - 1 for shard in shards])
    first_chunk = np.zeros(K + 1, np.int64)

    def chunks_of(number: int, begin: np.ndarray, document: np.ndarray, cut: np.ndarray) -> int:
        return example_rows.index_shard(
            shards[number].sentences.ctypes.data,
            shards[number].documents.ctypes.data,
            len(shards[number].documents) - 1,
            first_document[number],
            rules,
            begin,
            document,
            cut,
        )

    nothing = np.empty(0, np.int64), np.empty(0, np.uint32), np.empty(0, np.uint32)
    first_chunk[1:] = np.cumsum([chunks_of(number, *nothing) for number in range(K)])
    N = int(first_chunk[-1])
    begin_N, document_N = np.empty(N, np.int64), np.empty(N, np.uint32)
    cut_N = np.empty(N if rules.objective == example_rows.NSP else 0, np.uint32)
    for number in range(K):
        mine = slice(first_chunk[number], first_chunk[number + 1])
        chunks_of(number, begin_N[mine], document_N[mine], cut_N[mine])
    whole = [s.tokens if rules.objective == example_rows.NONE else s.sentences[1:] for s in shards]
    return example_rows.Corpus(
        tokens_K=np.array([s.tokens.ctypes.data for s in shards], np.int64),
        token_bytes_K=np.array([s.tokens.itemsize for s in shards], np.int64),
        sentences_K=np.array([s.sentences.ctypes.data for s in shards], np.int64),
        documents_K=np.array([s.documents.ctypes.data for s in shards], np.int64),
        first_document=first_document,
        first_chunk=first_chunk,
        chunk_begin_N=begin_N,
        chunk_end_K=np.array([len(each) for each in whole], np.int64),
        chunk_document_N=document_N,
        chunk_cut_N=cut_N,
        first_row=first_chunk,
        row_begin_R=np.empty(0, np.int64),
        row_chunk_N=np.empty(0, np.uint32),
    )


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array, not filled, at an address from which TensorFlow takes it over without a copy."""
    count = math.prod(shape)
    memory = np.empty(count * np.dtype(dtype).itemsize + _ALIGNMENT_BYTES, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT_BYTES
    return memory[begin : len(memory) - _ALIGNMENT_BYTES + begin].view(dtype).reshape(shape)
