"""BERT large: 24 layers of 1024, none shared, 336 M parameters with both heads.

Recipe as in bert_base.py.

--config=configs/bert_large.py
"""

from typing import Any

import bert_base
import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg` is not used."""
    del arg
    return enlarged(bert_base.published())


def enlarged(c: Any) -> Any:
    """`c`, sized as BERT's and RoBERTa's large models are."""
    c.model.embedding_size = 1024
    c.model.hidden_size = 1024
    c.model.num_hidden_layers = 24
    c.model.num_hidden_groups = 24
    c.model.num_attention_heads = 16
    c.model.intermediate_size = 4096
    c.train.microbatch_size = 16
    return c
