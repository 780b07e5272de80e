"""The examples equal the slow version's, follow the specified laws, and look like the released."""

import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from albert_jax.data import examples, order, store, tokenizer
from albert_jax.errors import UserError
from tests.data import slow_examples as slow

CLS, SEP, MASK = 2, 3, 4
SPECIAL = 5  # ids below are control pieces; of these only <unk> = 1 stands in text
KINDS = [("sop", "split"), ("sop", "random_next"), ("nsp", "split"), ("none", "split")]


def vocabulary(size: int, starts_word: np.ndarray | None = None) -> examples.Vocabulary:
    starts = np.ones(size, bool) if starts_word is None else starts_word
    return examples.Vocabulary(size, CLS, SEP, MASK, starts, np.arange(size) < SPECIAL)


def options(**changed: object) -> examples.ExampleOptions:
    usual = examples.ExampleOptions(
        max_seq_length=64,
        max_predictions_per_seq=9,
        masked_lm_prob=0.15,
        ngram=3,
        short_seq_prob=0.1,
        seed=7,
        sentence_objective="sop",
        single_sentence="split",
    )
    return dataclasses.replace(usual, **changed)


def random_split(rng: np.random.Generator, vocab_size: int, mean_sentence: float) -> slow.Split:
    """Up to four shards of up to five documents of up to 24 sentences; no sentence is empty."""
    text = np.r_[1, SPECIAL:vocab_size]
    most_sentences = int(rng.choice([2, 6, 25]))
    return [
        [
            [
                rng.choice(text, size=rng.geometric(1 / mean_sentence)).tolist()
                for _ in range(rng.integers(0, most_sentences))
            ]
            for _ in range(rng.integers(0, 6))
        ]
        for _ in range(rng.integers(1, 5))
    ]


def numbered_split(rng: np.random.Generator, *, longest: int = 30) -> tuple[slow.Split, int]:
    """A split in which no token occurs twice, with its vocabulary size."""
    count = SPECIAL
    split: slow.Split = []
    for sizes in ([3, 0, 40, 1], [], [0], [17, 2, 1, 1, 60]):
        split.append([])
        for sentences in sizes:
            lengths = np.minimum(rng.geometric(0.1, sentences), longest)
            ends = count + np.cumsum(lengths)
            split[-1].append(
                [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
            )
            count += int(lengths.sum())
    return split, count


def unmasked(batch: dict[str, np.ndarray]) -> np.ndarray:
    """`input_ids` as they were before masking."""
    ids_BL = batch["input_ids"].copy()
    rows, slots = np.nonzero(batch["masked_lm_weights"])
    ids_BL[rows, batch["masked_lm_positions"][rows, slots]] = batch["masked_lm_ids"][rows, slots]
    return ids_BL


def segments(ids_L: np.ndarray, types_L: np.ndarray, attention_L: np.ndarray) -> list[list[int]]:
    """A and B of an unmasked row, checked for their special tokens."""
    length = int(attention_L.sum())
    first_b = length - int(types_L.sum())
    assert ids_L[0] == CLS
    assert ids_L[first_b - 1] == SEP
    assert ids_L[length - 1] == SEP
    assert not types_L[:first_b].any()
    return [ids_L[1 : first_b - 1].tolist(), ids_L[first_b : length - 1].tolist()]


def within(share: float, expected: float, count: int, *, bias: float = 0.0) -> bool:
    """Whether a share seen in `count` trials is within four standard deviations of a law's."""
    return abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / count) + bias


@pytest.mark.parametrize("shuffle", ["global", "shard"])
@pytest.mark.parametrize(
    ("objective", "single_sentence", "packing"),
    [(*kind, packing) for packing in (False, True) for kind in KINDS if kind[0] != "none"]
    + [("none", "split", False)],
)
def test_equals_the_slow_version(objective: str, single_sentence: str, packing: bool, shuffle: str):
    compared = 0
    for trial in range(60):
        rng = np.random.default_rng(trial)
        V = int(rng.integers(8, 41))
        split = random_split(rng, V, float(rng.choice([1.2, 5, 20, 60])))
        with_text = [sum(map(bool, shard)) for shard in split]
        if sum(with_text) < 2 or (shuffle == "shard" and 1 in with_text):
            continue
        words = dataclasses.replace(vocabulary(V, rng.random(V) < 0.6), pad_id=trial % 2)
        chosen = options(
            max_seq_length=int(rng.choice([8, 9, 13, 33, 64])),
            max_predictions_per_seq=int(rng.choice([1, 2, 5, 20])),
            masked_lm_prob=float(rng.choice([0.02, 0.15, 0.5])),
            ngram=int(rng.integers(1, 6)),
            short_seq_prob=float(rng.choice([0, 0.1, 0.9])),
            seed=int(rng.integers(0, 2**60)),
            sentence_objective=objective,
            single_sentence=single_sentence,
            whole_word_masking=bool(rng.random() < 0.7),
            packing=packing,
            max_pairs_per_seq=int(rng.choice([1, 2, 4, 32])),
            shuffle=shuffle,
            shuffle_shards=int(rng.integers(1, 6)),
        )
        builder = examples.ExampleBuilder(slow.shards(split, (np.uint16, np.uint32)), words, chosen)
        N = builder.examples_per_epoch
        assert packing or len(slow.chunks(split, chosen)) == N
        wanted = slow.rows(split, words, chosen, range(2 * N + 3))
        batch = builder.batch(0, 2 * N + 3)
        assert set(batch) == set(wanted[0])
        for name, array in batch.items():
            assert array.dtype == (np.float32 if name.endswith("_weights") else np.int32)
            np.testing.assert_array_equal(array, np.array([row[name] for row in wanted]))
        compared += 2 * N + 3
    assert compared > (700 if packing else 1000)


@pytest.mark.parametrize(("objective", "single_sentence"), KINDS)
def test_a_sentence_of_100_000_tokens(objective: str, single_sentence: str):
    V = 50
    giant = np.random.default_rng(3).integers(SPECIAL, V, 100_000).tolist()
    split = [[[[7], giant, [8, 9]]], [[giant[:11]], [[6]]]]
    chosen = options(
        sentence_objective=objective, single_sentence=single_sentence, short_seq_prob=0.0
    )
    builder = examples.ExampleBuilder(slow.shards(split), vocabulary(V), chosen)
    N = builder.examples_per_epoch
    assert len(slow.chunks(split, chosen)) == N
    some = range(min(N, 12))
    batch = builder.batch(some.start, some.stop)
    wanted = slow.rows(split, vocabulary(V), chosen, some)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, np.array([row[name] for row in wanted]))


@pytest.mark.parametrize("objective", ["sop", "nsp", "none"])
def test_every_token_is_in_exactly_one_chunk_and_chunks_stay_in_their_document(objective: str):
    # Of the slow chunks, to which the builder's are equal (above).
    for seed in range(20):
        split, V = numbered_split(np.random.default_rng(seed), longest=200)
        found = slow.chunks(split, options(sentence_objective=objective, seed=seed))
        tokens = [token for chunk in found for token in slow.joined(chunk.sentences)]
        assert tokens == list(range(SPECIAL, V))
        if objective != "none":
            documents = [document for shard in split for document in shard]
            for chunk in found:
                assert all(sentence in documents[chunk.document] for sentence in chunk.sentences)


def test_an_epoch_of_full_sentences_shows_every_token_once():
    split, V = numbered_split(np.random.default_rng(5), longest=200)
    builder = examples.ExampleBuilder(
        slow.shards(split, (np.uint32,)), vocabulary(V), options(sentence_objective="none")
    )
    N = builder.examples_per_epoch
    orders = []
    for epoch in range(3):
        batch = builder.batch(epoch * N, (epoch + 1) * N)
        ids = unmasked(batch)
        np.testing.assert_array_equal(np.sort(ids[ids >= SPECIAL]), np.arange(SPECIAL, V))
        assert "sentence_order_labels" not in batch
        assert not batch["token_type_ids"].any()
        orders.append(tuple(ids[:, 1]))
    assert len(set(orders)) == 3


def test_full_sentences_are_whole_and_documents_are_separated():
    split, V = numbered_split(np.random.default_rng(8), longest=20)
    builder = examples.ExampleBuilder(
        slow.shards(split, (np.uint32,)), vocabulary(V), options(sentence_objective="none")
    )
    document_of = {}
    for number, document in enumerate(document for shard in split for document in shard):
        document_of |= dict.fromkeys(slow.joined(document), number)
    sentences = [s for shard in split for document in shard for s in document]
    starts, ends = {s[0] for s in sentences}, {s[-1] for s in sentences}
    batch = builder.batch(0, builder.examples_per_epoch)
    separators = 0
    for ids_L, length in zip(unmasked(batch), batch["attention_mask"].sum(1), strict=True):
        text = ids_L[1 : length - 1]
        runs = [run[run != SEP] for run in np.split(text, np.flatnonzero(text == SEP))]
        separators += len(runs) - 1
        assert text[text != SEP].tolist() == list(range(text[0], text[-1] + 1))
        for run in runs:
            assert run[0] in starts
            assert run[-1] in ends
        owners = [(document_of[run[0]], document_of[run[-1]]) for run in runs]
        assert all(first == last for first, last in owners)
        assert len(set(owners)) == len(owners)
    assert separators >= 3


@pytest.mark.parametrize("size", [*range(1, 40), 1009, 4096, 30_011])
def test_the_permutation_is_a_bijection(size: int):
    for epoch in range(3 if size < 5000 else 1):
        key = np.uint64(slow.key(11, slow.ORDER, epoch, 0))
        image = [order.permuted(slot, size, key) for slot in range(size)]
        assert sorted(image) == list(range(size))
        if size < 40:
            assert image == [slow.permuted(slot, size, int(key)) for slot in range(size)]


@pytest.mark.parametrize("size", [2**31 + 1, 2**40 - 87])
def test_the_permutation_of_a_huge_split_has_an_inverse(size: int):
    key = slow.key(12, slow.ORDER, 4, 0)
    random_slots = np.random.default_rng(0).integers(0, size, 1000).tolist()
    for slot in [*range(500), *random_slots, size - 2, size - 1]:
        chunk = order.permuted(slot, size, np.uint64(key))
        assert 0 <= chunk < size
        assert slow.unpermuted(chunk, size, key) == slot


def test_all_orders_of_four_chunks_are_equally_likely():
    counts: dict[tuple[int, ...], int] = {}
    epochs = 12_000
    for epoch in range(epochs):
        key = np.uint64(slow.key(1, slow.ORDER, epoch, 0))
        drawn = tuple(order.permuted(slot, 4, key) for slot in range(4))
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 24
    expected = epochs / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 58.6  # 23 degrees of freedom: exceeded once in 20,000


def test_sentence_order_labels_are_balanced_and_say_which_segment_came_first():
    split, V = numbered_split(np.random.default_rng(9))
    builder = examples.ExampleBuilder(slow.shards(split, (np.uint32,)), vocabulary(V), options())
    trials = 4000
    batch = builder.batch(0, trials)
    rows = zip(unmasked(batch), batch["token_type_ids"], batch["attention_mask"], strict=True)
    labels = batch["sentence_order_labels"]
    for (ids_L, types_L, attention_L), label in zip(rows, labels, strict=True):
        a, b = segments(ids_L, types_L, attention_L)
        if a and b:  # a document of one token has nothing to put in order
            assert (a[-1] < b[0]) == (label == 0)
            assert (b[-1] < a[0]) == (label == 1)
    assert within(labels.mean(), 0.5, trials)


@pytest.mark.parametrize(
    ("document", "cuts"),
    [
        ([[5, 6], [7, 8], [9, 10], [11, 12], [13, 14]], [2, 4, 6, 8]),  # after a sentence
        ([[5, 6, 7, 8, 9, 10, 11]], [1, 2, 3, 4, 5, 6]),  # one sentence: after a token
    ],
)
def test_cuts_are_uniform(document: slow.Document, cuts: list[int]):
    builder = examples.ExampleBuilder(
        slow.shards([[document]]), vocabulary(20), options(short_seq_prob=0.0)
    )
    trials = 6000
    batch = builder.batch(0, trials)
    total = len(slow.joined(document))
    b_lengths = batch["token_type_ids"].sum(1) - 1
    first = np.where(batch["sentence_order_labels"] == 0, total - b_lengths, b_lengths)
    values, counts = np.unique(first, return_counts=True)
    assert values.tolist() == cuts
    assert all(within(count / trials, 1 / len(cuts), trials) for count in counts)


def test_a_document_of_one_token_makes_an_example():
    builder = examples.ExampleBuilder(slow.shards([[[[9]]]]), vocabulary(11), options())
    batch = builder.batch(0, 50)
    assert set(batch["attention_mask"].sum(1)) == {4}
    assert set(batch["masked_lm_ids"][:, 0]) == {9}


def test_truncation_takes_from_the_longer_segment_and_from_both_its_ends():
    split, V = numbered_split(np.random.default_rng(2), longest=45)
    builder = examples.ExampleBuilder(
        slow.shards(split, (np.uint32,)), vocabulary(V), options(short_seq_prob=0.0)
    )
    sentences = [s for shard in split for document in shard for s in document]
    starts, ends = {s[0] for s in sentences}, {s[-1] for s in sentences}
    batch = builder.batch(0, 4000)
    uneven, cut_front, cut_back = 0, 0, 0
    for row in zip(unmasked(batch), batch["token_type_ids"], batch["attention_mask"], strict=True):
        if not row[2].all():
            continue
        shorter, longer = sorted(segments(*row), key=len)
        if len(longer) - len(shorter) > 1 and shorter:
            uneven += 1
            assert shorter[0] in starts
            assert shorter[-1] in ends
            cut_front += longer[0] not in starts
            cut_back += longer[-1] not in ends
    assert uneven > 300
    assert abs(cut_front - cut_back) < 4 * math.sqrt(cut_front + cut_back)


def test_next_sentence_pairs():
    split, V = numbered_split(np.random.default_rng(6))
    builder = examples.ExampleBuilder(
        slow.shards(split, (np.uint32,)), vocabulary(V), options(sentence_objective="nsp")
    )
    document_of = {}
    for number, document in enumerate(document for shard in split for document in shard):
        document_of |= dict.fromkeys(slow.joined(document), number)
    batch = builder.batch(0, 1500)
    rows = zip(unmasked(batch), batch["token_type_ids"], batch["attention_mask"], strict=True)
    for row, label in zip(rows, batch["sentence_order_labels"], strict=True):
        a, b = segments(*row)
        if a and b:
            assert (document_of[a[0]] != document_of[b[0]]) == (label == 1)
            assert label == 1 or a[-1] < b[0]
    # With so many sentences, single ones (always random) hardly weigh.
    long_split = [[[[5 + i % 50] * 3 for i in range(3000)], [[60]]]]
    labels = examples.ExampleBuilder(
        slow.shards(long_split), vocabulary(61), options(sentence_objective="nsp")
    ).batch(0, 400)["sentence_order_labels"]
    assert within(labels.mean(), 0.5, 150, bias=0.05)


def test_masking_keeps_the_rules():
    rng = np.random.default_rng(13)
    V = 97
    starts = rng.random(V) < 0.5
    split = random_split(rng, V, 12.0) + random_split(rng, V, 40.0)
    for objective in ("sop", "none"):
        chosen = options(sentence_objective=objective, max_predictions_per_seq=8)
        builder = examples.ExampleBuilder(slow.shards(split), vocabulary(V, starts), chosen)
        batch = builder.batch(0, 3000)
        ids_BL, lengths = unmasked(batch), batch["attention_mask"].sum(1)
        for b, length in enumerate(lengths):
            masks = int(batch["masked_lm_weights"][b].sum())
            positions = batch["masked_lm_positions"][b, :masks]
            assert masks <= min(8, max(1, round(0.15 * length)))
            assert np.all(np.diff(positions) > 0)
            assert positions[0] > 0
            assert positions[-1] < length
            assert not np.isin(ids_BL[b, positions], [CLS, SEP]).any()
            assert not batch["masked_lm_weights"][b, masks:].any()
            assert not batch["masked_lm_positions"][b, masks:].any()
            assert not batch["masked_lm_ids"][b, masks:].any()
            # A piece that continues a word is masked exactly if the piece before it is.
            masked_L = np.zeros(length, bool)
            masked_L[positions] = True
            text_L = ~np.isin(ids_BL[b, :length], [CLS, SEP])
            continues_L = text_L[1:] & text_L[:-1] & ~starts[ids_BL[b, 1:length]]
            assert np.all(masked_L[1:][continues_L] == masked_L[:-1][continues_L])


def test_what_becomes_of_masked_pieces():
    V = 45
    document = [np.random.default_rng(0).integers(SPECIAL, V, 2000).tolist()]
    builder = examples.ExampleBuilder(
        slow.shards([[document]]), vocabulary(V), options(sentence_objective="none")
    )
    batch = builder.batch(0, 10_000)
    used = batch["masked_lm_weights"] > 0
    there = np.take_along_axis(batch["input_ids"], batch["masked_lm_positions"], axis=1)[used]
    was = batch["masked_lm_ids"][used]
    count = len(there)
    drawn = there[(there != MASK) & (there != was)]
    same_by_chance = 0.1 / (V - SPECIAL)
    assert within(np.mean(there == MASK), 0.8, count)
    assert within(np.mean(there == was), 0.1 + same_by_chance, count)
    assert within(len(drawn) / count, 0.1 - same_by_chance, count)
    shares = np.bincount(drawn, minlength=V) / len(drawn)
    assert not shares[:SPECIAL].any()
    assert all(within(share, 1 / (V - SPECIAL), len(drawn)) for share in shares[SPECIAL:])


def test_ngram_lengths_follow_one_over_n():
    # So few masks in so long a sequence that n-grams hardly ever touch.
    L, P = 60_000, 300
    builder = examples.ExampleBuilder(
        slow.shards([[[[5, 6, 7, 8, 9] * 12_000]]]),
        vocabulary(11),
        options(max_seq_length=L, max_predictions_per_seq=P, sentence_objective="none"),
    )
    lengths = []
    for first in range(0, 100, 2):
        batch = builder.batch(first, first + 1)
        positions = batch["masked_lm_positions"][batch["masked_lm_weights"] > 0]
        runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
        lengths += [len(run) for run in runs]
    for n, share in ((1, 6 / 11), (2, 3 / 11), (3, 2 / 11)):
        # Two in 100 touch, and the last one of a sequence may have been shortened.
        assert within(np.mean(np.array(lengths) == n), share, len(lengths), bias=0.015)


def test_looks_like_the_released_script(shared_data: pathlib.Path):
    """Each figure beside that of google-research/albert's script on the same novel.

    Its copies differ among themselves (28 documents, each short or not), and so do seeds of ours:
    the tolerance is four standard deviations of the difference, by the spread over our seeds, and
    0.0006 for the departures (B's first piece is a word of its own) and the rounding of figures.
    """
    folder = shared_data / "reference" / "google_examples"
    chapters = re.split(r"\n\s*\n", (folder / "sentences.txt").read_text(encoding="utf-8"))
    documents = [chapter.strip().splitlines() for chapter in chapters]
    sentencepiece = tokenizer.Tokenizer.load(
        shared_data / "tokenizer" / "spiece.model", tokenizer.Normalization()
    )
    ids, offsets = sentencepiece.encode_batch([line for lines in documents for line in lines])
    shard = store.Shard(
        ids.astype(np.uint16), offsets, np.cumsum([0] + [len(lines) for lines in documents])
    )
    words = examples.Vocabulary.of(sentencepiece)
    released = json.loads((folder / "statistics.json").read_text())
    length_128 = options(
        max_seq_length=128, max_predictions_per_seq=20, single_sentence="random_next"
    )
    length_512 = dataclasses.replace(length_128, max_seq_length=512, max_predictions_per_seq=77)
    next_sentence = dataclasses.replace(length_128, ngram=1, sentence_objective="nsp")
    for name, copies, chosen in (
        ("sop_128_x12", 12, length_128),
        ("sop_512_x4", 4, length_512),
        ("nsp_128", 1, next_sentence),
    ):
        ours: list[dict[str, float]] = []
        for seed in range(24):
            builder = examples.ExampleBuilder(
                [shard], words, dataclasses.replace(chosen, seed=seed)
            )
            ours.append(statistics(builder.batch(0, builder.examples_per_epoch), words))
        wanted = released[name]
        wanted |= {f"{n} words": share for n, share in wanted.pop("words_in_a_masked_run").items()}
        wanted["examples"] /= copies
        for figure, theirs in wanted.items():
            values = np.array([each.get(figure, 0.0) for each in ours])
            deviation = values.std(ddof=1) * math.sqrt(1 / copies + 1 / len(values))
            line = f"{name:12} {figure:26} released {theirs:9.4f} ours {values.mean():9.4f}"
            print(f"{line} ± {deviation:.4f}")
            assert abs(values.mean() - theirs) <= 4 * deviation + 0.0006, line


def statistics(batch: dict[str, np.ndarray], words: examples.Vocabulary) -> dict[str, float]:
    """The figures of the released examples' `statistics.json`."""
    attention_BL, ids_BL = batch["attention_mask"], unmasked(batch)
    used = batch["masked_lm_weights"] > 0
    was = batch["masked_lm_ids"][used]
    there = np.take_along_axis(batch["input_ids"], batch["masked_lm_positions"], axis=1)[used]
    runs: list[int] = []
    for b, used_P in enumerate(used):
        positions = batch["masked_lm_positions"][b, used_P]
        parts = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
        runs += [int(words.starts_word[ids_BL[b, part]].sum()) for part in parts]
    lengths_B = attention_BL.sum(1)
    budgets_B = [min(used.shape[1], max(1, round(0.15 * int(length)))) for length in lengths_B]
    shares = {f"{n} words": runs.count(n) / len(runs) for n in set(runs)}
    return shares | {
        "examples": len(ids_BL),
        "label_1_share": float(batch["sentence_order_labels"].mean()),
        "mean_length": float(lengths_B.mean()),
        "full_length_share": float(attention_BL.all(1).mean()),
        "predictions_per_token": float(used.sum() / attention_BL.sum()),
        "masked_to_MASK": float(np.mean(there == words.mask_id)),
        "kept": float(np.mean(there == was)),
        "random": float(np.mean((there != words.mask_id) & (there != was))),
        "budget_reached_share": float(np.mean(used.sum(1) == budgets_B)),
        "segment_B_share_of_tokens": float(batch["token_type_ids"].sum() / attention_BL.sum()),
    }


def test_rows_do_not_depend_on_their_batch_thread_or_storage(tmp_path: pathlib.Path):
    rng = np.random.default_rng(21)
    V = 60
    split = random_split(rng, V, 15.0)
    in_memory = slow.shards(split)
    mapped = []
    for number, shard in enumerate(in_memory):
        arrays = {}
        for name in ("tokens", "sentences", "documents"):
            np.save(tmp_path / f"{number}.{name}.npy", getattr(shard, name))
            arrays[name] = np.load(
                tmp_path / f"{number}.{name}.npy",
                mmap_mode="r" if getattr(shard, name).size else None,
            )
        mapped.append(store.Shard(**arrays))
    whole = examples.ExampleBuilder(in_memory, vocabulary(V), options()).batch(0, 96)
    builder = examples.ExampleBuilder(mapped, vocabulary(V), options())
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda first: builder.batch(first, first + 3), range(0, 96, 3)))
    scattered = builder.rows(np.array([50, -1, 3]))
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
        np.testing.assert_array_equal(scattered[name], [array[50], 0 * array[0], array[3]])


def test_rows_from_the_end_on_are_zero():
    split, V = numbered_split(np.random.default_rng(4))
    builder = examples.ExampleBuilder(slow.shards(split), vocabulary(V), options())
    batch = builder.batch(3, 9, end=5)
    for name, array in batch.items():
        np.testing.assert_array_equal(array[:2], builder.batch(3, 5)[name])
        assert not array[2:].any()


def test_other_seed_other_examples():
    split, V = numbered_split(np.random.default_rng(4))
    one, other = (
        examples.ExampleBuilder(slow.shards(split), vocabulary(V), options(seed=seed)).batch(0, 9)
        for seed in (0, 1)
    )
    assert (one["input_ids"] != other["input_ids"]).any(1).all()


GOOD = slow.shards([[[[5, 6], [7]], [[8]]]])[0]


@pytest.mark.parametrize(
    ("shard", "changed", "message"),
    [
        (slow.shards([[[], []]])[0], {}, "holds no text"),
        (slow.shards([[[[5]], []]])[0], {"sentence_objective": "nsp"}, "holds one document"),
        (slow.shards([[[[5]]]])[0], {"single_sentence": "random_next"}, "holds one document"),
        (dataclasses.replace(GOOD, sentences=np.array([0, 2, 2, 4])), {}, "sentences must"),
        (dataclasses.replace(GOOD, sentences=np.array([0, 2, 3, 9])), {}, "end with 4 and grow"),
        (dataclasses.replace(GOOD, documents=np.array([0, 3, 2, 3])), {}, "documents must"),
        (dataclasses.replace(GOOD, documents=np.array([1, 3])), {}, "documents must"),
        (dataclasses.replace(GOOD, tokens=GOOD.tokens.astype(np.int64)), {}, "are int64"),
        (GOOD, {"ngram": 0}, "ngram=0"),
        (GOOD, {"max_seq_length": 7}, "max_seq_length=7"),
        (GOOD, {"sentence_objective": "order"}, "sentence_objective='order'"),
    ],
)
def test_what_makes_no_examples_is_refused(
    shard: store.Shard, changed: dict[str, object], message: str
):
    with pytest.raises(UserError, match=re.escape(message)):
        examples.ExampleBuilder([shard], vocabulary(9), options(**changed))


def test_a_token_outside_the_vocabulary_is_named():
    good, bad = slow.shards([[[[5, 6]], [[7]]], [[[5, 6, 300]]]])
    builder = examples.ExampleBuilder([good, bad], vocabulary(9), options())
    with pytest.raises(UserError, match="shard 1, token 2 is 300, but the tokenizer has only 9"):
        builder.batch(0, 3)


def test_imports_where_no_cache_can_be_written(tmp_path: pathlib.Path):
    # Even root cannot write below a file.
    package = tmp_path / "albert_jax"
    here = pathlib.Path(examples.__file__).parent
    shutil.copytree(here.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "data" / "__pycache__").touch()
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "NUMBA_CACHE_DIR": ""}
    done = subprocess.run(
        [sys.executable, "-c", "import albert_jax.data.examples as e; print(e.__file__)"],
        cwd=tmp_path,
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(package / "data" / "examples.py")
    assert done.stderr == ""
