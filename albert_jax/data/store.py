"""The token store: memory-mapped shards of token ids, and the manifest that vouches for them."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a split, memory-mapped.

    Attributes:
        tokens: uint16 or uint32 [T], ids without special tokens.
        sentences: int64 [S+1], offsets into `tokens`; starts with 0, ends with T.
        documents: int64 [D+1], offsets into `sentences`; starts with 0, ends with S.
    """

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
