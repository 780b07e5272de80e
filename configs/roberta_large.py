"""RoBERTa large: 24 layers of 1024, none shared, 355 M parameters with the masked-word head.

Recipe as in roberta_base.py, with its own learning rate and warm-up.

--config=configs/roberta_large.py
"""

import bert_large
import ml_collections
import roberta_base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg` is not used."""
    del arg
    c = bert_large.enlarged(roberta_base.published())
    c.optimizer.learning_rate = 4e-4
    c.optimizer.warmup_steps = 30_000
    return c
