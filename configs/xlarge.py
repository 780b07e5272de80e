"""ALBERT xlarge: 24 layers of 2048, 59.0 M parameters with both heads.

v2 (default): no dropout, 3 M steps. v1: dropout 0.1, 125 k steps.
Recipe as in base.py. Dev-set average of the released models: v2 87.9, v1 85.5.

--config=configs/xlarge.py, --config=configs/xlarge.py:v1
"""

import base
import ml_collections


def get_config(arg: str = "v2") -> ml_collections.ConfigDict:
    """The recipe `arg`: v1 or v2."""
    c = base.published(arg, steps_v2=3_000_000)
    c.model.hidden_size = 2048
    c.model.num_hidden_layers = 24
    c.model.num_attention_heads = 16
    c.model.intermediate_size = 8192
    c.train.microbatch_size = 16
    return c
