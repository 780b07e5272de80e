"""Batches of packed rows, made by the builder, and the same pairs in rows of their own."""

import jax.numpy as jnp
import numpy as np

from albert_jax.data import examples
from tests.data import slow_examples as slow

VOCAB, LENGTH, SLOTS, PAIRS = 64, 48, 12, 6
Place = tuple[int, int, int, int, int, int]


def batch(objective: str, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of pairs of random text, from documents of one to six short sentences."""
    rng = np.random.default_rng(seed)
    documents = [
        [rng.integers(5, VOCAB, rng.integers(1, 7)).tolist() for _ in range(rng.integers(1, 7))]
        for _ in range(20 * rows)
    ]
    vocabulary = examples.Vocabulary(VOCAB, 2, 3, 4, np.ones(VOCAB, bool), np.arange(VOCAB) < 5)
    options = examples.ExampleOptions(
        max_seq_length=LENGTH,
        max_predictions_per_seq=SLOTS,
        masked_lm_prob=0.15,
        ngram=2,
        short_seq_prob=0.1,
        seed=seed,
        sentence_objective=objective,
        single_sentence="split",
        packing=True,
        max_pairs_per_seq=PAIRS,
    )
    return examples.ExampleBuilder(slow.shards([documents]), vocabulary, options).batch(0, rows)


def packed_and_alone(objective: str, rows: int) -> tuple[dict, dict, list[Place]]:
    """A packed batch, the same pairs one a row in a batch without packing, and where each was.

    A place is (row, which pair of it, first place, length, first masked slot, masked slots).
    """
    packed = batch(objective, rows)
    alone: list[dict[str, np.ndarray]] = []
    places: list[Place] = []
    for row in range(rows):
        slot = 0
        for at in range(int(packed["sentence_order_weights"][row].sum())):
            (mine,) = np.nonzero(packed["segment_ids"][row] == at + 1)
            begin, length = int(mine[0]), len(mine)
            positions = packed["masked_lm_positions"][row]
            masked = packed["masked_lm_weights"][row] > 0
            slots = int(np.sum(masked & (positions >= begin) & (positions < begin + length)))
            places.append((row, at, begin, length, slot, slots))
            new = {
                name: np.zeros(LENGTH, np.int32)
                for name in ("input_ids", "token_type_ids", "attention_mask")
            }
            for name, array in new.items():
                array[:length] = packed[name][row, begin : begin + length]
            for name in ("positions", "ids", "weights"):
                values = packed[f"masked_lm_{name}"][row, slot : slot + slots]
                new[f"masked_lm_{name}"] = np.zeros(SLOTS, values.dtype)
                new[f"masked_lm_{name}"][:slots] = values
            new["masked_lm_positions"][:slots] -= begin
            new["sentence_order_labels"] = packed["sentence_order_labels"][row, at]
            alone.append(new)
            slot += slots
    return (
        {name: jnp.asarray(array) for name, array in packed.items()},
        {name: jnp.asarray(np.stack([each[name] for each in alone])) for name in alone[0]},
        places,
    )
