"""The compiled part of `examples`: a shard's chunks, and rows of pairs, cut and masked.

In:  the shards by their addresses, and the rules, as plain arrays and numbers.
Out: arrays that the caller made, filled.

What is done here, draw by draw, stands in `examples`. All of it lies in one file, for what numba
keeps of a function on disk is renewed when that file changes, not one whose functions it calls.

Shapes: as in `examples`; D documents of a shard, R rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import extending

from albert_jax.data import compilation
from albert_jax.data import order as order_lib

OBJECTIVES = {"sop": 0, "nsp": 1, "none": 2}
SOP, NSP, NONE = OBJECTIVES.values()
CONTINUES, STARTS, SPECIAL = 0, 1, 2  # kinds of pieces
_GAMMA, _DOCUMENT = order_lib.GAMMA, order_lib.DOCUMENT
_EXAMPLE, _OTHER = order_lib.EXAMPLE, order_lib.OTHER
_mix, _key, _scaled = order_lib.mix, order_lib.key, order_lib.scaled
_AT_ONCE = 32  # rows whose text is fetched from memory together; that of more leaves the cache
_OFFSET_BYTES, _LINE_BYTES = 8, 64  # of an int64; of what memory is fetched by


class Corpus(NamedTuple):
    """The shards as the compiled code sees them, and the chunks."""

    tokens_K: np.ndarray  # int64, addresses of the shards' arrays
    token_bytes_K: np.ndarray  # int64, 2 or 4
    sentences_K: np.ndarray  # int64, addresses
    documents_K: np.ndarray  # int64, addresses
    first_document: np.ndarray  # int64 [K+1], number in the split of each shard's first document
    first_chunk: np.ndarray  # int64 [K+1], likewise
    chunk_begin_N: np.ndarray  # int64, in its shard: first sentence (`none`: first token)
    chunk_end_K: np.ndarray  # int64, where the last chunk of each shard ends
    chunk_document_N: np.ndarray  # uint32, in its shard
    chunk_cut_N: np.ndarray  # uint32, sentences of segment A; [0] but for `nsp`
    first_row: np.ndarray  # int64 [K+1], number in the split of each shard's first row
    row_begin_R: np.ndarray  # int64 [R+1], where a row's chunks begin below; [0] without packing
    row_chunk_N: np.ndarray  # uint32, chunks in their shard, row after row; [0] without packing


class Rules(NamedTuple):
    """The options and the vocabulary as the compiled code sees them."""

    objective: int
    random_next: bool
    by_shard: bool  # a random other text is one of the same shard
    room: int  # tokens of text in a sequence
    seed: np.uint64
    short_below: int  # of 2**32
    cls_id: int
    sep_id: int
    mask_id: int
    pad_id: int
    piece_kind_V: np.ndarray  # uint8: CONTINUES, STARTS or SPECIAL
    replacements: np.ndarray  # int32, the pieces that are not control pieces
    budgets: np.ndarray  # int64 [L+1], by sequence length
    ngram_law: np.ndarray  # int64 [ngram+1], running sums of M/n
    packing: bool


class Batch(NamedTuple):
    """The arrays to fill."""

    ids_BL: np.ndarray
    types_BL: np.ndarray
    attention_BL: np.ndarray
    positions_BP: np.ndarray
    targets_BP: np.ndarray
    weights_BP: np.ndarray
    labels_BS: np.ndarray  # S = 1 without packing
    label_weights_BS: np.ndarray  # from here on only with packing, else [0, ...]
    segments_BL: np.ndarray
    begins_BS: np.ndarray


_compiled, _uncounted = compilation.compiled, compilation.uncounted


def _as_pointer(_: Any, address: Any, dtype: Any) -> Any:
    """The int64 `address` as a C pointer, so that all shards go through one signature."""
    pointer = numba.types.CPointer(dtype.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return pointer(numba.types.int64, dtype), generate


def _prefetch(_: Any, address: Any) -> Any:
    """Begins to fetch the memory at the int64 `address` into the cache; any address is allowed."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
        # To be read, kept in all caches, data.
        flags = [number(0), number(3), number(1)]
        builder.call(prefetch, [builder.inttoptr(arguments[0], byte), *flags])
        return context.get_dummy_value()

    return numba.types.none(numba.types.int64), generate


_pointer: Callable[..., Any] = extending.intrinsic(_as_pointer)
_fetch_line: Callable[..., Any] = extending.intrinsic(_prefetch)
_carray: Callable[..., Any] = numba.carray  # pyright: ignore[reportPrivateImportUsage]


@_compiled
def _array_at(address: int, dtype: Any, length: int) -> np.ndarray:
    return _carray(_pointer(address, dtype), (length,))


@_compiled
def _offsets(address: int, length: int) -> np.ndarray:
    return _array_at(address, numba.int64, length)


@_uncounted
def _below(stream: np.ndarray, n: int) -> np.int64:
    """Takes a draw from `stream`, uint64 [1]."""
    stream[0] += _GAMMA
    return _scaled(_mix(stream[0]), n)


@_uncounted
def _begin_document(stream: np.ndarray, rules: Rules, document: int) -> int:
    """Sets `stream` to the document's, and returns its target length in tokens."""
    stream[0] = _key(rules.seed, _DOCUMENT, document, 0)
    if _below(stream, 2**32) < rules.short_below:
        return 2 + _below(stream, rules.room - 1)
    return rules.room


@_compiled
def index_shard(
    sentences_address: int,
    documents_address: int,
    D: int,
    first_document: int,
    rules: Rules,
    begin_N: np.ndarray,
    document_N: np.ndarray,
    cut_N: np.ndarray,
) -> int:
    """Writes down a shard's chunks, as far as the arrays reach, and returns how many there are."""
    documents = _offsets(documents_address, D + 1)
    sentences = _offsets(sentences_address, documents[D] + 1)
    if rules.objective == NONE:
        return _index_full(sentences, documents, D, rules.room, begin_N, document_N)
    stream = np.empty(1, np.uint64)
    chunks = 0
    for d in range(D):
        target = _begin_document(stream, rules, first_document + d)
        begin, last = documents[d], documents[d + 1]
        s = begin
        while s < last:
            s += 1
            if s < last and sentences[s] - sentences[begin] < target:
                continue
            cut = s - begin
            if rules.objective == NSP and cut > 1:
                cut = 1 + _below(stream, cut - 1)
                if _below(stream, 2) == 1:
                    s = begin + cut
            if chunks < len(begin_N):
                begin_N[chunks] = begin
                document_N[chunks] = d
            if chunks < len(cut_N):
                cut_N[chunks] = cut
            chunks += 1
            begin = s
    return chunks


@_compiled
def _index_full(
    sentences: np.ndarray,
    documents: np.ndarray,
    D: int,
    room: int,
    begin_N: np.ndarray,
    document_N: np.ndarray,
) -> int:
    chunks = 0
    used = room  # places taken in the chunk at hand
    for d in range(D):
        separator = 1
        for s in range(documents[d], documents[d + 1]):
            at, end = sentences[s], sentences[s + 1]
            too_long = end - at > room
            while at < end:
                left = room - used - separator
                if left < end - at and not (too_long and left > 0):
                    if chunks < len(begin_N):
                        begin_N[chunks] = at
                        document_N[chunks] = d
                    chunks += 1
                    used, separator, left = 0, 0, room
                piece = min(left, end - at)
                at += piece
                used += separator + piece
                separator = 0
    return chunks


class _Scratch(NamedTuple):
    """Where a pair is worked on. A word w has the pieces from begins[w] up to ends[w + 1]."""

    streams: np.ndarray  # uint64 [3, 1], random streams: an example's, and two for `_random_other`
    kinds: np.ndarray  # uint8, of each piece: whether it continues a word, starts one, is special
    begins: np.ndarray  # int32
    ends: np.ndarray  # int32
    closes: np.ndarray  # int32, of each word: the word after the last of its segment
    order: np.ndarray  # int32, words as they are visited, then those that are masked
    masked: np.ndarray  # uint8, of each word and of what an n-gram may reach beyond the last


@_compiled
def _make_scratch(L: int, ngram: int) -> _Scratch:
    return _Scratch(
        np.empty((3, 1), np.uint64),
        np.empty(L, np.uint8),
        np.empty(L + ngram, np.int32),
        np.empty(L + ngram, np.int32),
        np.empty(L + ngram, np.int32),
        np.empty(L + ngram, np.int32),
        np.empty(L + ngram, np.uint8),
    )


@_compiled
def build(
    corpus: Corpus, rules: Rules, epochs_B: np.ndarray, rows_B: np.ndarray, batch: Batch
) -> bool:
    """Fills the batch; False where a token is not in the vocabulary."""
    scratch = _make_scratch(batch.ids_BL.shape[1], len(rules.ngram_law))
    return _fill(corpus, rules, epochs_B, rows_B, batch, scratch)


@_uncounted
def _fill(
    corpus: Corpus,
    rules: Rules,
    epochs_B: np.ndarray,
    rows_B: np.ndarray,
    batch: Batch,
    scratch: _Scratch,
) -> bool:
    B, L = batch.ids_BL.shape
    stream = scratch.streams[0]
    for b in range(B):
        if b % _AT_ONCE == 0:
            _fetch(corpus, rules, rows_B[b : b + _AT_ONCE])
        ids_L, types_L, attention_L = batch.ids_BL[b], batch.types_BL[b], batch.attention_BL[b]
        batch.labels_BS[b] = 0
        if rules.packing:
            batch.label_weights_BS[b] = 0
            batch.segments_BL[b] = 0
            batch.begins_BS[b] = 0
        at, made = 0, 0  # places filled, pieces masked
        row, shard, pairs = rows_B[b], 0, 0
        if row >= 0:
            shard = np.searchsorted(corpus.first_row, row, side="right") - 1
            pairs = corpus.row_begin_R[row + 1] - corpus.row_begin_R[row] if rules.packing else 1
        for s in range(pairs):
            chunk = row
            if rules.packing:
                inside = np.int64(corpus.row_chunk_N[corpus.row_begin_R[row] + s])
                chunk = corpus.first_chunk[shard] + inside
            stream[0] = _key(rules.seed, _EXAMPLE, epochs_B[b], chunk)
            free_L, first_b = ids_L[at:], L
            if rules.objective == NONE:
                length = _lay_full(corpus, rules, shard, chunk, free_L)
            else:
                length, first_b, batch.labels_BS[b, s] = _lay_pair(
                    corpus, rules, shard, chunk, scratch, free_L
                )
            if length < 0:
                return False
            for p in range(length):
                scratch.kinds[p] = rules.piece_kind_V[free_L[p]]
            positions_p = batch.positions_BP[b, made:]
            masks = _mask(rules, scratch, free_L, length, positions_p, batch.targets_BP[b, made:])
            types_L[at:] = 0
            types_L[at + first_b : at + length] = 1
            if rules.packing:
                batch.label_weights_BS[b, s] = 1
                batch.segments_BL[b, at : at + length] = s + 1
                batch.begins_BS[b, s] = at
                for m in range(masks):
                    positions_p[m] += at
            at += length
            made += masks
        ids_L[at:] = rules.pad_id
        attention_L[:at] = 1
        attention_L[at:] = 0
        types_L[at:] = 0
        batch.positions_BP[b, made:] = 0
        batch.targets_BP[b, made:] = 0
        batch.weights_BP[b, :made] = 1
        batch.weights_BP[b, made:] = 0
    return True


@_uncounted
def _fetch(corpus: Corpus, rules: Rules, rows_b: np.ndarray) -> None:
    """Asks for the text of some rows, so that they wait for memory together and not in turn: first
    for where their chunks' text begins, then for the text.
    """
    for asks_for_text in range(2):
        for row in rows_b:
            if row < 0:
                continue
            shard = np.searchsorted(corpus.first_row, row, side="right") - 1
            first, last = row, row + 1
            if rules.packing:
                first, last = corpus.row_begin_R[row], corpus.row_begin_R[row + 1]
            for c in range(first, last):
                chunk = c
                if rules.packing:
                    chunk = corpus.first_chunk[shard] + np.int64(corpus.row_chunk_N[c])
                token = corpus.chunk_begin_N[chunk]
                if rules.objective != NONE:
                    sentence = corpus.sentences_K[shard] + _OFFSET_BYTES * token
                    if not asks_for_text:
                        _fetch_line(sentence)
                        continue
                    token = _offsets(sentence, 1)[0]
                if asks_for_text:
                    size = corpus.token_bytes_K[shard]
                    for line in range(0, size * rules.room, _LINE_BYTES):
                        _fetch_line(corpus.tokens_K[shard] + size * token + line)


@_compiled
def mask_rows(
    rules: Rules,
    ids_BL: np.ndarray,
    positions_BP: np.ndarray,
    targets_BP: np.ndarray,
    weights_BP: np.ndarray,
    starts_BL: np.ndarray,
    lengths_B: np.ndarray,
    epochs_B: np.ndarray,
    numbers_B: np.ndarray,
) -> None:
    """Masks rows in place, as `examples.Masker.mask` says; all but those of negative numbers."""
    B, L = ids_BL.shape
    scratch = _make_scratch(L, len(rules.ngram_law))
    for b in range(B):
        if numbers_B[b] < 0:
            continue
        positions_BP[b] = 0
        targets_BP[b] = 0
        weights_BP[b] = 0
        for p in range(lengths_B[b]):
            special = rules.piece_kind_V[ids_BL[b, p]] == SPECIAL
            scratch.kinds[p] = SPECIAL if special else starts_BL[b, p]
        scratch.streams[0] = _key(rules.seed, _EXAMPLE, epochs_B[b], numbers_B[b])
        masks = _mask(rules, scratch, ids_BL[b], lengths_B[b], positions_BP[b], targets_BP[b])
        weights_BP[b, :masks] = 1


@_compiled
def pair_lengths(corpus: Corpus, rules: Rules, shard: int, lengths_C: np.ndarray) -> None:
    """Writes down how many places each pair of a shard takes, at most L."""
    sentences = _offsets(corpus.sentences_K[shard], corpus.chunk_end_K[shard] + 1)
    stream, of_document = np.empty(1, np.uint64), np.empty(1, np.uint64)
    for c in range(len(lengths_C)):
        chunk = corpus.first_chunk[shard] + c
        begin, end = _bounds(corpus, shard, chunk)
        text = sentences[end] - sentences[begin]
        if _has_other(corpus, rules, chunk, end - begin):
            stream[0] = _key(rules.seed, _OTHER, chunk, 0)
            _, b_begin, b_end = _random_other(
                corpus, rules, stream, of_document, shard, chunk, text
            )
            text += b_end - b_begin
        lengths_C[c] = min(text, rules.room) + 3


@_uncounted
def _has_other(corpus: Corpus, rules: Rules, chunk: int, k: int) -> bool:
    """Whether B comes from another document than the chunk, which has `k` sentences."""
    if rules.objective == NSP:
        return k == corpus.chunk_cut_N[chunk]
    return k == 1 and rules.random_next


@_uncounted
def _lay_full(corpus: Corpus, rules: Rules, shard: int, chunk: int, ids_L: np.ndarray) -> int:
    """Writes a chunk of full sentences into `ids_L`; its length, or -1 for an unknown token."""
    D = corpus.first_document[shard + 1] - corpus.first_document[shard]
    documents = _offsets(corpus.documents_K[shard], D + 1)
    sentences = _offsets(corpus.sentences_K[shard], documents[D] + 1)
    at, end = _bounds(corpus, shard, chunk)
    d = np.int64(corpus.chunk_document_N[chunk])
    ids_L[0] = rules.cls_id
    length = 1
    while at < end:
        stop = min(end, sentences[documents[d + 1]])
        if at < stop:
            if length > 1:
                ids_L[length] = rules.sep_id
                length += 1
            if not _copy(corpus, rules, shard, at, stop, ids_L, length):
                return -1
            length += stop - at
            at = stop
        d += 1
    ids_L[length] = rules.sep_id
    return length + 1


@_uncounted
def _lay_pair(
    corpus: Corpus, rules: Rules, shard: int, chunk: int, scratch: _Scratch, ids_L: np.ndarray
) -> tuple[int, int, int]:
    """Writes a sentence pair into `ids_L`; (length or -1, where B begins, label)."""
    stream = scratch.streams[0]
    begin, end = _bounds(corpus, shard, chunk)
    sentences = _offsets(corpus.sentences_K[shard], end + 1)
    a_begin, b_end = sentences[begin], sentences[end]
    k = end - begin
    label = 0
    other = _has_other(corpus, rules, chunk, k)
    if other:
        a_end = b_end
    elif rules.objective == NSP:
        a_end = sentences[begin + corpus.chunk_cut_N[chunk]]
    elif k > 1:
        a_end = sentences[begin + 1 + _below(stream, k - 1)]
    elif b_end - a_begin > 1:
        a_end = a_begin + 1 + _below(stream, b_end - a_begin - 1)
    else:
        a_end = b_end
    a_shard, b_shard, b_begin = shard, shard, a_end
    if other:
        label = 1
        if rules.packing:
            scratch.streams[1] = _key(rules.seed, _OTHER, chunk, 0)
        drawn = scratch.streams[1 if rules.packing else 0]
        b_shard, b_begin, b_end = _random_other(
            corpus, rules, drawn, scratch.streams[2], shard, chunk, a_end - a_begin
        )
    elif rules.objective == SOP:
        label = _below(stream, 2)
        if label == 1:
            a_begin, a_end, b_begin, b_end = b_begin, b_end, a_begin, a_end
    excess = a_end - a_begin + b_end - b_begin - rules.room
    for _ in range(excess):
        last = _below(stream, 2)
        if a_end - a_begin > b_end - b_begin:
            a_begin += 1 - last
            a_end -= last
        else:
            b_begin += 1 - last
            b_end -= last
    first_b = a_end - a_begin + 2
    length = first_b + b_end - b_begin + 1
    ids_L[0] = rules.cls_id
    known = _copy(corpus, rules, a_shard, a_begin, a_end, ids_L, 1)
    ids_L[first_b - 1] = rules.sep_id
    known &= _copy(corpus, rules, b_shard, b_begin, b_end, ids_L, first_b)
    ids_L[length - 1] = rules.sep_id
    return length if known else -1, first_b, label


@_uncounted
def _bounds(corpus: Corpus, shard: int, chunk: int) -> tuple[int, int]:
    if chunk + 1 < corpus.first_chunk[shard + 1]:
        return corpus.chunk_begin_N[chunk], corpus.chunk_begin_N[chunk + 1]
    return corpus.chunk_begin_N[chunk], corpus.chunk_end_K[shard]


@_uncounted
def _random_other(
    corpus: Corpus,
    rules: Rules,
    stream: np.ndarray,
    of_document: np.ndarray,
    shard: int,
    chunk: int,
    a_length: int,
) -> tuple[int, int, int]:
    """Text from another document than the chunk's, which is in `shard`: (its shard, first token,
    past the last token).
    """
    own = corpus.first_document[shard] + np.int64(corpus.chunk_document_N[chunk])
    wanted = _begin_document(of_document, rules, own) - a_length
    first_other, others = np.int64(0), corpus.first_document[-1]
    if rules.by_shard:
        first_other = corpus.first_document[shard]
        others = corpus.first_document[shard + 1] - first_other
    while True:
        other = first_other + _below(stream, others)
        # Shards without documents share their number with the next one: take the last of them.
        shard = np.searchsorted(corpus.first_document, other, side="right") - 1
        d = other - corpus.first_document[shard]
        documents = _offsets(corpus.documents_K[shard], d + 2)
        first, last = documents[d], documents[d + 1]
        if other != own and first < last:
            break
    sentences = _offsets(corpus.sentences_K[shard], last + 1)
    begin = first + _below(stream, last - first)
    end = begin + 1
    while end < last and sentences[end] - sentences[begin] < wanted:
        end += 1
    return shard, sentences[begin], sentences[end]


@_uncounted
def _copy(
    corpus: Corpus, rules: Rules, shard: int, begin: int, end: int, ids_L: np.ndarray, at: int
) -> bool:
    """Copies a shard's tokens to `ids_L[at:]`; False where one is not in the vocabulary."""
    size, address = corpus.token_bytes_K[shard], corpus.tokens_K[shard]
    if size == 2:
        tokens = _array_at(address + 2 * begin, numba.uint16, end - begin)
        highest = _copy_from(tokens, ids_L[at:])
    else:
        wide_tokens = _array_at(address + 4 * begin, numba.uint32, end - begin)
        highest = _copy_from(wide_tokens, ids_L[at:])
    return highest < len(rules.piece_kind_V)


@_uncounted
def _copy_from(tokens: np.ndarray, ids_L: np.ndarray) -> np.int64:
    highest = tokens.dtype.type(0)
    for i in range(len(tokens)):
        highest = max(highest, tokens[i])
        ids_L[i] = tokens[i]
    return np.int64(highest)


@_uncounted
def _mask(
    rules: Rules,
    scratch: _Scratch,
    ids_L: np.ndarray,
    length: int,
    positions_P: np.ndarray,
    targets_P: np.ndarray,
) -> int:
    """Masks words of `ids_L` in place and writes down what was there; how many pieces.

    The pieces' kinds and the random stream are in `scratch`.
    """
    begins, ends, closes = scratch.begins, scratch.ends, scratch.closes
    order, masked = scratch.order, scratch.masked
    # Unsigned, or numba would look at each index whether it counts from the end.
    words, segment, fresh = np.uint64(0), np.uint64(0), np.uint64(1)
    for p in range(1, length):
        if scratch.kinds[p] == SPECIAL:
            for w in range(segment, words):
                closes[w] = words
            segment, fresh = words, np.uint64(1)
        else:
            begins[words] = p
            words += np.uint64(scratch.kinds[p]) | fresh
            ends[words] = p + 1
            fresh = np.uint64(0)
    words = np.int64(words)
    longest = len(rules.ngram_law) - 1
    for w in range(words):
        order[w] = w
    for w in range(words + longest):
        masked[w] = 0

    # n is counted and its words are looked at without branches, which could not be foreseen.
    state = scratch.streams[0, 0]
    left = rules.budgets[length]
    for v in range(words):
        state += _GAMMA
        other = v + _scaled(_mix(state), words - v)
        w = np.int64(order[other])
        order[other] = order[v]
        if masked[w]:
            continue
        state += _GAMMA
        drawn = _scaled(_mix(state), rules.ngram_law[min(longest, closes[w] - w)])
        n = 1
        for k in range(1, longest):
            n += drawn >= rules.ngram_law[k]
        while n > 0 and ends[w + n] - begins[w] > left:
            n -= 1
        free = n > 0
        for k in range(1, longest):
            free &= (masked[w + k] == 0) | (k >= n)
        if not free:
            continue
        for k in range(longest):
            masked[w + k] |= k < n
        left -= ends[w + n] - begins[w]
        if left == 0:
            break

    found = np.uint64(0)
    for w in range(words):
        order[found] = w
        found += np.uint64(masked[w])
    m = 0
    for i in range(np.int64(found)):
        first, last = begins[order[i]], ends[order[i] + 1]
        for p in range(first, last):
            positions_P[m] = p
            m += 1
    for i in range(m):
        p = positions_P[i]
        targets_P[i] = kept = ids_L[p]
        state += _GAMMA
        kind = _scaled(_mix(state), 10)
        if kind == 9:
            state += _GAMMA
            ids_L[p] = rules.replacements[_scaled(_mix(state), len(rules.replacements))]
        else:
            ids_L[p] = rules.mask_id if kind < 8 else kept
    return m
