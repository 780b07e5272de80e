"""Pretraining examples the slow, obvious way: lists, sets and one token at a time.

Written from the specification in the docstring of `albert_jax/data/examples.py`, as the reference
that the compiled builder is compared with. A split is a list of shards, a shard a list of
documents, a document a list of sentences, a sentence a list of ids; `shards` makes token-store
shards of it. Where choices are made, the random stream is an argument: anything with `below(n)`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from albert_jax.data import examples, store

Sentence = list[int]
Document = list[Sentence]
Split = list[list[Document]]

WORD = 2**64
GAMMA = 0x9E3779B97F4A7C15
DOCUMENT, ORDER, EXAMPLE, OTHER, SHARDS, WINDOW = 1, 2, 3, 4, 5, 6


def shards(split: Split, dtypes: Sequence[type] = (np.uint16,)) -> list[store.Shard]:
    """The split as the builder takes it; `dtypes` are those of the shards' tokens, in turn."""
    made = []
    for number, documents in enumerate(split):
        sentences = [sentence for document in documents for sentence in document]
        made.append(
            store.Shard(
                tokens=np.array(joined(sentences), dtypes[number % len(dtypes)]),
                sentences=np.cumsum([0, *map(len, sentences)]),
                documents=np.cumsum([0, *map(len, documents)]),
            )
        )
    return made


class Stream(Protocol):
    def below(self, n: int) -> int:
        """A random whole number in [0, n)."""
        ...


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def key(seed: int, purpose: int, a: int, b: int) -> int:
    for value in (purpose, a, b):
        seed = mix(seed) ^ value
    return mix(seed)


def scaled(draw: int, n: int) -> int:
    return (draw >> 32) * n >> 32


class SplitMix64:
    def __init__(self, key: int) -> None:
        self.state = key

    def below(self, n: int) -> int:
        self.state = (self.state + GAMMA) % WORD
        return scaled(mix(self.state), n)


def permuted(slot: int, size: int, key: int) -> int:
    """The chunk at a slot of an epoch."""
    width = math.isqrt(size - 1) + 1
    while True:
        slot = feistel(slot, width, key, 1)
        if slot < size:
            return slot


def unpermuted(chunk: int, size: int, key: int) -> int:
    """The slot of a chunk: `permuted` the other way round."""
    width = math.isqrt(size - 1) + 1
    while True:
        chunk = feistel(chunk, width, key, -1)
        if chunk < size:
            return chunk


def feistel(x: int, width: int, key: int, direction: int) -> int:
    halves = [x // width, x % width]
    for r in range(8)[::direction]:
        changed, other = r % 2, 1 - r % 2
        step = scaled(mix((key + (r + 1) * GAMMA) % WORD ^ halves[other]), width)
        halves[changed] = (halves[changed] + direction * step) % width
    return halves[0] * width + halves[1]


@dataclasses.dataclass
class Chunk:
    document: int  # number in the split of the document where it begins
    sentences: list[Sentence]  # `none`: a run of tokens for each document it touches
    target: int = 0  # length in tokens that the document's chunks aim at
    a_sentences: int = 0  # `nsp`: how many are segment A
    random_next: bool = False  # `nsp`: segment B comes from elsewhere


def chunks(split: Split, options: examples.ExampleOptions) -> list[Chunk]:
    return [chunk for shard in shard_chunks(split, options) for chunk in shard]


def shard_chunks(split: Split, options: examples.ExampleOptions) -> list[list[Chunk]]:
    """The chunks of each shard."""
    shards: list[list[Chunk]] = []
    first = 0
    for shard in split:
        if options.sentence_objective == "none":
            found = full_sentence_chunks(shard, first, options.max_seq_length - 2)
        else:
            found = []
            for number, document in enumerate(shard, start=first):
                stream = SplitMix64(key(options.seed, DOCUMENT, number, 0))
                found += document_chunks(document, number, options, stream)
        shards.append(found)
        first += len(shard)
    return shards


def document_chunks(
    document: Document, number: int, options: examples.ExampleOptions, stream: Stream
) -> list[Chunk]:
    room = options.max_seq_length - 3
    target = room
    if stream.below(2**32) < round(options.short_seq_prob * 2**32):
        target = 2 + stream.below(room - 1)
    found = []
    waiting = list(document)
    while waiting:
        gathered: list[Sentence] = []
        while waiting and sum(map(len, gathered)) < target:
            gathered.append(waiting.pop(0))
        chunk = Chunk(number, gathered, target)
        if options.sentence_objective == "nsp":
            chunk.a_sentences = 1
            chunk.random_next = True
            if len(gathered) > 1:
                chunk.a_sentences = 1 + stream.below(len(gathered) - 1)
                chunk.random_next = stream.below(2) == 1
            if chunk.random_next:
                waiting = gathered[chunk.a_sentences :] + waiting
                chunk.sentences = gathered[: chunk.a_sentences]
        found.append(chunk)
    return found


def full_sentence_chunks(shard: list[Document], first: int, room: int) -> list[Chunk]:
    found: list[Chunk] = []
    left = 0
    for number, document in enumerate(shard, start=first):
        goes_on = False  # the chunk at hand holds a piece of this document
        for sentence in document:
            rest = sentence
            while rest:
                separator = 0 if goes_on else 1
                fits = len(rest) + separator <= left
                fills = len(sentence) > room and 1 + separator <= left
                if not fits and not fills:
                    found.append(Chunk(number, []))
                    left = room
                    goes_on = False
                    separator = 0
                piece, rest = rest[: left - separator], rest[left - separator :]
                if goes_on:
                    found[-1].sentences[-1] = found[-1].sentences[-1] + piece
                else:
                    found[-1].sentences.append(piece)
                left -= separator + len(piece)
                goes_on = True
    return found


def rows(
    split: Split,
    vocabulary: examples.Vocabulary,
    options: examples.ExampleOptions,
    numbers: range,
) -> list[dict[str, Any]]:
    """The numbered examples of a run, one dict a row."""
    all_chunks = chunks(split, options)
    all_rows = [[number] for number in range(len(all_chunks))]
    if options.packing:
        all_rows = packed(all_chunks, split, options)
    shard_of = [k for k, found in enumerate(shard_chunks(split, options)) for _ in found]
    counts = [sum(shard_of[row[0]] == k for row in all_rows) for k in range(len(split))]
    orders: dict[int, list[int]] = {}
    built = []
    for number in numbers:
        epoch, slot = divmod(number, len(all_rows))
        if epoch not in orders:
            orders[epoch] = epoch_order(epoch, counts, options)
        row = orders[epoch][slot]
        pairs = []
        for chunk in all_rows[row]:
            stream = SplitMix64(key(options.seed, EXAMPLE, epoch, chunk))
            other = SplitMix64(key(options.seed, OTHER, chunk, 0)) if options.packing else stream
            pairs.append(example(all_chunks[chunk], split, vocabulary, options, stream, other))
        built.append(laid_out(pairs, vocabulary, options))
    return built


def epoch_order(epoch: int, counts: Sequence[int], options: examples.ExampleOptions) -> list[int]:
    """The numbers of all rows as an epoch visits them; `counts` has how many each shard has."""
    if options.shuffle == "global":
        of_epoch = key(options.seed, ORDER, epoch, 0)
        return [permuted(slot, sum(counts), of_epoch) for slot in range(sum(counts))]
    numbered, number = [], 0
    for count in counts:
        numbered.append(list(range(number, number + count)))
        number += count
    of_epoch = key(options.seed, SHARDS, epoch, 0)
    waiting = [numbered[permuted(place, len(counts), of_epoch)] for place in range(len(counts))]
    visited, window = [], 0
    while waiting:
        together = [row for shard in waiting[: options.shuffle_shards] for row in shard]
        of_window = key(options.seed, WINDOW, epoch, window)
        visited += [
            together[permuted(slot, len(together), of_window)] for slot in range(len(together))
        ]
        waiting = waiting[options.shuffle_shards :]
        window += 1
    return visited


def packed(
    all_chunks: list[Chunk], split: Split, options: examples.ExampleOptions
) -> list[list[int]]:
    """The numbers of the chunks of each row: best fit, shard by shard."""
    L = options.max_seq_length
    first_documents = np.cumsum([0, *map(len, split)])
    found: list[list[int]] = []
    for shard in range(len(split)):
        room: dict[int, int] = {}  # of each open row, in the order in which they were added to
        slots: dict[int, int] = {}
        for number, chunk in enumerate(all_chunks):
            if not first_documents[shard] <= chunk.document < first_documents[shard + 1]:
                continue
            other = SplitMix64(key(options.seed, OTHER, number, 0))
            a, b, _ = pair(chunk, split, options, SplitMix64(0), other)
            length = min(len(a) + len(b), L - 3) + 3
            masks = budget(length, options)
            latest = {room[row]: row for row in room}  # of those with the same room, the last
            fitting = [
                (left, row)
                for left, row in latest.items()
                if left >= length and slots[row] >= masks
            ]
            row = len(found)
            if fitting:
                row = min(fitting)[1]
            else:
                found.append([])
            found[row].append(number)
            left, slots[row] = (
                room.pop(row, L) - length,
                slots.get(row, options.max_predictions_per_seq) - masks,
            )
            if left >= 4 and slots[row] > 0 and len(found[row]) < options.max_pairs_per_seq:
                room[row] = left
    return found


@dataclasses.dataclass
class Example:
    """A pair, or full sentences, with its special pieces."""

    ids: list[int]  # masked
    types: list[int]
    positions: list[int]
    targets: list[int]
    label: int | None


def example(
    chunk: Chunk,
    split: Split,
    vocabulary: examples.Vocabulary,
    options: examples.ExampleOptions,
    stream: Stream,
    other: Stream | None = None,
) -> Example:
    """`other` is where a random other text is drawn from; by default the example's own stream."""
    cls, sep = vocabulary.cls_id, vocabulary.sep_id
    if options.sentence_objective == "none":
        segments = chunk.sentences
        label = None
    else:
        a, b, label = pair(chunk, split, options, stream, other or stream)
        truncate(a, b, options.max_seq_length - 3, stream)
        segments = [a, b]
    ids = [cls]
    for segment in segments:
        ids += [*segment, sep]
    types = [0] * len(ids)
    if label is not None:
        types = [0] * (len(segments[0]) + 2) + [1] * (len(segments[1]) + 1)
    positions, targets = mask(ids, vocabulary, options, stream)
    return Example(ids, types, positions, targets, label)


def laid_out(
    pairs: list[Example], vocabulary: examples.Vocabulary, options: examples.ExampleOptions
) -> dict[str, Any]:
    """A row of a batch: one example, or with packing several."""
    L, P = options.max_seq_length, options.max_predictions_per_seq
    begins = np.cumsum([0, *(len(each.ids) for each in pairs)]).tolist()
    positions = [
        begin + place
        for begin, each in zip(begins, pairs, strict=False)
        for place in each.positions
    ]
    row: dict[str, Any] = {
        "input_ids": padded(joined([each.ids for each in pairs]), L, vocabulary.pad_id),
        "token_type_ids": padded(joined([each.types for each in pairs]), L),
        "attention_mask": padded([1] * begins[-1], L),
        "masked_lm_positions": padded(positions, P),
        "masked_lm_ids": padded(joined([each.targets for each in pairs]), P),
        "masked_lm_weights": padded([1.0] * len(positions), P),
    }
    labels = [each.label for each in pairs]
    if options.packing:
        S = options.max_pairs_per_seq
        numbers = [[number] * len(each.ids) for number, each in enumerate(pairs, start=1)]
        row["sentence_order_labels"] = padded(labels, S)
        row["sentence_order_weights"] = padded([1.0] * len(pairs), S)
        row["segment_ids"] = padded(joined(numbers), L)
        row["cls_positions"] = padded(begins[:-1], S)
    elif labels[0] is not None:
        row["sentence_order_labels"] = labels[0]
    return row


def padded(values: list, length: int, filler: int = 0) -> list:
    assert len(values) <= length
    return values + [filler] * (length - len(values))


def pair(
    chunk: Chunk,
    split: Split,
    options: examples.ExampleOptions,
    stream: Stream,
    other: Stream,
) -> tuple[list[int], list[int], int]:
    sentences = chunk.sentences
    tokens = joined(sentences)
    if options.sentence_objective == "nsp":
        a = joined(sentences[: chunk.a_sentences])
        if chunk.random_next:
            return a, random_other(chunk, len(a), split, options, other), 1
        return a, joined(sentences[chunk.a_sentences :]), 0
    if len(sentences) > 1:
        cut = 1 + stream.below(len(sentences) - 1)
        a, b = joined(sentences[:cut]), joined(sentences[cut:])
    elif options.single_sentence == "random_next":
        return tokens, random_other(chunk, len(tokens), split, options, other), 1
    else:
        cut = 1 if len(tokens) == 1 else 1 + stream.below(len(tokens) - 1)
        a, b = tokens[:cut], tokens[cut:]
    swapped = stream.below(2)
    return (b, a, 1) if swapped else (a, b, 0)


def joined(sentences: list[Sentence]) -> list[int]:
    return [token for sentence in sentences for token in sentence]


def random_other(
    chunk: Chunk, a_length: int, split: Split, options: examples.ExampleOptions, stream: Stream
) -> list[int]:
    documents = [document for shard in split for document in shard]
    choice = list(range(len(documents)))
    if options.shuffle == "shard":
        of_shard = [number for number, shard in enumerate(split) for _ in shard]
        choice = [d for d in choice if of_shard[d] == of_shard[chunk.document]]
    other = chunk.document
    while other == chunk.document or not documents[other]:
        other = choice[stream.below(len(choice))]
    begin = stream.below(len(documents[other]))
    b: list[int] = []
    for sentence in documents[other][begin:]:
        b += sentence
        if len(b) >= chunk.target - a_length:
            break
    return b


def truncate(a: list[int], b: list[int], room: int, stream: Stream) -> None:
    while len(a) + len(b) > room:
        longer = a if len(a) > len(b) else b
        longer.pop(0 if stream.below(2) == 0 else -1)


def words_of(
    ids: list[int], vocabulary: examples.Vocabulary, whole_words: bool
) -> list[list[list[int]]]:
    """For each segment, its words, each the list of its positions."""
    segments: list[list[list[int]]] = [[]]
    for position, piece in enumerate(ids):
        if piece in (vocabulary.cls_id, vocabulary.sep_id):
            segments.append([])
        elif not whole_words or vocabulary.starts_word[piece] or not segments[-1]:
            segments[-1].append([position])
        else:
            segments[-1][-1].append(position)
    return segments


def budget(length: int, options: examples.ExampleOptions) -> int:
    """How many pieces of a sequence are masked, at most."""
    share = round(length * options.masked_lm_prob)
    return min(options.max_predictions_per_seq, max(1, share))


def mask(
    ids: list[int],
    vocabulary: examples.Vocabulary,
    options: examples.ExampleOptions,
    stream: Stream,
) -> tuple[list[int], list[int]]:
    """Masks `ids` in place; (positions, what was there)."""
    most = budget(len(ids), options)
    multiple = math.lcm(*range(1, options.ngram + 1))
    # What follows each word in its segment, itself included, as far as an n-gram may reach.
    reach = [
        segment[i : i + options.ngram]
        for segment in words_of(ids, vocabulary, options.whole_word_masking)
        for i in range(len(segment))
    ]
    masked: set[int] = set()
    for visit in range(len(reach)):
        if len(masked) == most:
            break
        chosen = visit + stream.below(len(reach) - visit)
        reach[visit], reach[chosen] = reach[chosen], reach[visit]
        words = reach[visit]
        if masked.intersection(words[0]):
            continue
        weights = [multiple // n for n in range(1, len(words) + 1)]
        drawn = stream.below(sum(weights))
        n = next(n for n in range(1, len(words) + 1) if drawn < sum(weights[:n]))
        positions = joined(words[:n])
        while n > 0 and len(masked) + len(positions) > most:
            n -= 1
            positions = joined(words[:n])
        if not masked.intersection(positions):
            masked.update(positions)
    drawable = np.flatnonzero(~vocabulary.is_control).tolist()
    ordered = sorted(masked)
    targets = [ids[position] for position in ordered]
    for position in ordered:
        kind = stream.below(10)
        if kind < 8:
            ids[position] = vocabulary.mask_id
        elif kind == 9:
            ids[position] = drawable[stream.below(len(drawable))]
    return ordered, targets
