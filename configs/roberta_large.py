"""RoBERTa large: 24 layers of 1024, none shared, 355 M parameters with the masked-word head.

Recipe as in roberta_base.py, with its own learning rate and warm-up.

--config=configs/roberta_large.py
"""

import ml_collections
import roberta_base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg` is not used."""
    del arg
    c = roberta_base.published()
    c.model.embedding_size = 1024
    c.model.hidden_size = 1024
    c.model.num_hidden_layers = 24
    c.model.num_hidden_groups = 24
    c.model.num_attention_heads = 16
    c.model.intermediate_size = 4096
    c.train.microbatch_size = 16
    c.optimizer.learning_rate = 4e-4
    c.optimizer.warmup_steps = 30_000
    return c
