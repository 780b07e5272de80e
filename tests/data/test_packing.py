"""Rows of several pairs: each pair in one of them and as it would be alone, and little padding."""

import dataclasses

import numpy as np
import pytest

from albert_jax.data import examples, packing
from albert_jax.errors import UserError
from tests.data import slow_examples as slow

CLS, SEP, MASK, FIRST = 2, 3, 4, 5
OPTIONS = examples.ExampleOptions(
    max_seq_length=64,
    max_predictions_per_seq=10,
    masked_lm_prob=0.15,
    ngram=3,
    short_seq_prob=0.1,
    seed=3,
    sentence_objective="sop",
    single_sentence="split",
)


def short_documents(seed: int) -> tuple[slow.Split, examples.Vocabulary]:
    """Three shards of documents of up to 50 tokens, no token of which occurs twice."""
    rng = np.random.default_rng(seed)
    count = FIRST
    split: slow.Split = []
    for documents in (40, 0, 75):
        split.append([])
        for _ in range(documents):
            split[-1].append([])
            for length in rng.integers(1, 11, rng.integers(0, 6)).tolist():
                split[-1][-1].append(list(range(count, count + length)))
                count += length
    every = np.ones(count, bool)
    return split, examples.Vocabulary(count, CLS, SEP, MASK, every, np.arange(count) < FIRST)


def unmasked(batch: dict[str, np.ndarray]) -> np.ndarray:
    ids_BL = batch["input_ids"].copy()
    rows, slots = np.nonzero(batch["masked_lm_weights"])
    ids_BL[rows, batch["masked_lm_positions"][rows, slots]] = batch["masked_lm_ids"][rows, slots]
    return ids_BL


def pairs_of(batch: dict[str, np.ndarray], b: int) -> list[tuple]:
    """What each pair of a row holds, counted from its own [CLS]."""
    found = []
    segments_L, positions_P = batch["segment_ids"][b], batch["masked_lm_positions"][b]
    for s in range(int(batch["sentence_order_weights"][b].sum())):
        (places,) = np.nonzero(segments_L == s + 1)
        begin, end = int(batch["cls_positions"][b, s]), int(places[-1]) + 1
        assert places.tolist() == list(range(begin, end))
        used_P = (batch["masked_lm_weights"][b] > 0) & (begin <= positions_P) & (positions_P < end)
        found.append(
            (
                batch["input_ids"][b, begin:end].tolist(),
                batch["token_type_ids"][b, begin:end].tolist(),
                (positions_P[used_P] - begin).tolist(),
                batch["masked_lm_ids"][b, used_P].tolist(),
                int(batch["sentence_order_labels"][b, s]),
            )
        )
    return found


def test_an_epoch_has_every_token_once_and_its_rows_stay():
    split, vocabulary = short_documents(0)
    options = dataclasses.replace(OPTIONS, packing=True)
    builder = examples.ExampleBuilder(slow.shards(split, (np.uint32,)), vocabulary, options)
    R, epochs = builder.examples_per_epoch, []
    for epoch in range(3):
        batch = builder.batch(epoch * R, (epoch + 1) * R)
        ids_BL = unmasked(batch)
        tokens = np.sort(ids_BL[ids_BL >= FIRST])
        np.testing.assert_array_equal(tokens, np.arange(FIRST, vocabulary.vocab_size))
        np.testing.assert_array_equal(batch["attention_mask"], batch["segment_ids"] > 0)
        epochs.append(batch)
    rows = [[frozenset(row[row >= FIRST].tolist()) for row in unmasked(batch)] for batch in epochs]
    assert set(rows[0]) == set(rows[1]) == set(rows[2])  # which pairs share a row
    assert rows[0] != rows[1] != rows[2]  # and when
    assert sorted(map(tuple, epochs[0]["input_ids"])) != sorted(map(tuple, epochs[1]["input_ids"]))


@pytest.mark.parametrize("objective", ["sop", "nsp"])
def test_each_pair_is_what_it_is_without_packing(objective: str):
    """Cut, order, truncation, masks: but for the other texts of `nsp`, which are drawn apart."""
    split, vocabulary = short_documents(1)
    alone = dataclasses.replace(OPTIONS, sentence_objective=objective)
    together = dataclasses.replace(alone, packing=True, max_pairs_per_seq=5)
    built = [
        examples.ExampleBuilder(slow.shards(split, (np.uint32,)), vocabulary, options)
        for options in (alone, together)
    ]
    N, R = (builder.examples_per_epoch for builder in built)
    assert R < N / 2
    for epoch in range(2):
        batch = built[0].batch(epoch * N, (epoch + 1) * N)
        batch["segment_ids"] = batch["attention_mask"]
        batch["cls_positions"] = np.zeros((N, 1), np.int32)
        batch["sentence_order_weights"] = np.ones((N, 1), np.float32)
        batch["sentence_order_labels"] = batch["sentence_order_labels"][:, None]
        ours = built[1].batch(epoch * R, (epoch + 1) * R)
        wanted = [pair for b in range(N) for pair in pairs_of(batch, b)]
        found = [pair for b in range(R) for pair in pairs_of(ours, b)]
        assert len(found) == len(wanted) == N
        if objective == "nsp":
            wanted, found = ([pair for pair in some if not pair[4]] for some in (wanted, found))
            assert len(found) > 10
        assert sorted(found) == sorted(wanted)
        assert ours["sentence_order_weights"].sum(1).max() <= 5


@pytest.mark.parametrize("objective", ["sop", "nsp"])
@pytest.mark.parametrize("single_sentence", ["split", "random_next"])
def test_the_figures_are_those_of_the_rows(objective: str, single_sentence: str):
    split, vocabulary = short_documents(2)
    options = dataclasses.replace(
        OPTIONS, packing=True, sentence_objective=objective, single_sentence=single_sentence
    )
    shards = slow.shards(split, (np.uint32,))
    builder = examples.ExampleBuilder(shards, vocabulary, options)
    figures, R = builder.packing(), builder.examples_per_epoch
    batch = builder.batch(R, 2 * R)  # lengths are those of every epoch
    lengths = [len(pair[0]) for b in range(R) for pair in pairs_of(batch, b)]
    assert figures.rows == R
    assert figures.pairs == len(lengths)
    assert figures.pieces == sum(lengths) == batch["attention_mask"].sum()
    assert figures.squares == sum(length**2 for length in lengths)
    assert figures.padding_with == pytest.approx(1 - batch["attention_mask"].mean())
    unpacked = dataclasses.replace(options, packing=False)
    assert examples.ExampleBuilder(shards, vocabulary, unpacked).packing() == figures


@pytest.mark.parametrize(
    ("mean", "most"), [(20, 0.02), (60, 0.02), (150, 0.04), (300, 0.06)]
)  # of 512; next fit, the plain way, leaves 3, 8, 19 and 24 %
def test_few_places_are_left(mean: int, most: float):
    lengths_C = np.random.default_rng(mean).lognormal(np.log(mean) - 0.18, 0.6, 50_000)
    lengths_C = np.clip(lengths_C, 4, 512).astype(np.int32)
    budgets_L = np.array([min(77, max(1, round(0.15 * n))) for n in range(513)])
    rows = packing.pack(lengths_C, budgets_L, 512, 77, 32)
    assert sorted(rows.sequence_C.tolist()) == list(range(50_000))
    starts = rows.first_R[:-1]
    taken_R = np.add.reduceat(lengths_C[rows.sequence_C], starts)
    masked_R = np.add.reduceat(budgets_L[lengths_C[rows.sequence_C]], starts)
    assert taken_R.max() <= 512
    assert masked_R.max() <= 77
    assert np.diff(rows.first_R).max() <= 32
    padding = 1 - taken_R.mean() / 512
    print(f"pairs of {lengths_C.mean():.0f} on average: {padding:.1%} padding")
    assert padding < most


def test_full_sentences_are_not_packed():
    with pytest.raises(UserError, match="packing=True makes no examples: use False with none"):
        dataclasses.replace(OPTIONS, packing=True, sentence_objective="none")
