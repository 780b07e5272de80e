"""Packing: which short sequences share a row, so that rows are not mostly padding.

In:  the length of every sequence of a shard, and how many of its pieces will be masked.
Out: rows, each a list of sequences that fit into it together.

Promise: every sequence is in exactly one row, and no row holds more than `max_seq_length` pieces,
`max_predictions` masked pieces or `max_sequences` sequences.

Best fit, in one pass and almost constant time a sequence. A row is open while it has room for
`SHORTEST` pieces, for a masked piece and for a sequence. A sequence of n pieces goes into the open
row with the least room that has room for n pieces and for its masked pieces, but of the rows with
the same room only the one that was added to last is asked; where none takes it, it begins a row.
Rows are numbered as they are begun; in a row sequences keep the shard's order.

Shapes: C sequences of a shard, R rows, L places of a row.
"""

from typing import NamedTuple

import numpy as np

from albert_jax.data import compilation

SHORTEST = 4  # places of the shortest sequence there is: [CLS], a piece, [SEP] and a [SEP] more


class Rows(NamedTuple):
    """The rows of a shard."""

    first_R: np.ndarray  # int64 [R+1]: where each row's sequences begin in `sequence_C`
    sequence_C: np.ndarray  # uint32: numbers of sequences, row after row


def pack(
    lengths_C: np.ndarray,
    budgets_L: np.ndarray,
    max_seq_length: int,
    max_predictions: int,
    max_sequences: int,
) -> Rows:
    """The rows of one shard.

    Args:
        lengths_C: int32, places that each sequence takes, `SHORTEST` to `max_seq_length`.
        budgets_L: int64 [L+1], pieces that are masked of a sequence, by its length; at most
            `max_predictions`.
        max_seq_length: L, places in a row.
        max_predictions: masked pieces in a row.
        max_sequences: sequences in a row.
    """
    row_C = np.empty(len(lengths_C), np.uint32)
    count = _best_fit(lengths_C, budgets_L, max_seq_length, max_predictions, max_sequences, row_C)
    sequence_C = np.empty(len(lengths_C), np.uint32)
    return Rows(_sorted_by_row(row_C, count, sequence_C), sequence_C)


@compilation.compiled
def _best_fit(
    lengths_C: np.ndarray,
    budgets_L: np.ndarray,
    max_seq_length: int,
    max_predictions: int,
    max_sequences: int,
    row_C: np.ndarray,
) -> int:
    """Writes each sequence's row into `row_C`; how many rows there are."""
    C = len(lengths_C)
    # Open rows lie on stacks, one for each amount of room; -1 ends a stack.
    top_L = np.full(max_seq_length + 1, -1, np.int64)
    under_R = np.empty(C, np.int64)
    room_R, slots_R, left_R = np.empty(C, np.int32), np.empty(C, np.int32), np.empty(C, np.int32)
    count = 0
    for sequence in range(C):
        length = lengths_C[sequence]
        budget = budgets_L[length]
        row = -1
        for room in range(length, max_seq_length + 1):
            asked = top_L[room]
            if asked >= 0 and slots_R[asked] >= budget:
                row = asked
                top_L[room] = under_R[row]
                break
        if row < 0:
            row = count
            count += 1
            room_R[row] = max_seq_length
            slots_R[row] = max_predictions
            left_R[row] = max_sequences
        room_R[row] -= length
        slots_R[row] -= budget
        left_R[row] -= 1
        if room_R[row] >= SHORTEST and slots_R[row] > 0 and left_R[row] > 0:
            under_R[row] = top_L[room_R[row]]
            top_L[room_R[row]] = row
        row_C[sequence] = row
    return count


@compilation.compiled
def _sorted_by_row(row_C: np.ndarray, count: int, sequence_C: np.ndarray) -> np.ndarray:
    """Writes the sequences into `sequence_C` by row, and returns where each row begins."""
    first_R = np.zeros(count + 1, np.int64)
    for row in row_C:
        first_R[row + 1] += 1
    for row in range(count):
        first_R[row + 1] += first_R[row]
    next_R = first_R[:-1].copy()
    for sequence in range(len(row_C)):
        row = row_C[sequence]
        sequence_C[next_R[row]] = sequence
        next_R[row] += 1
    return first_R
