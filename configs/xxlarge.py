"""ALBERT xxlarge: 12 layers of 4096, 223.2 M parameters with both heads.

v2 (default): no dropout, 3 M steps. v1: no dropout either, 125 k steps.
Recipe as in base.py. Dev-set average of the released models: v2 90.9, v1 91.0.

--config=configs/xxlarge.py, --config=configs/xxlarge.py:v1
"""

import base
import ml_collections


def get_config(arg: str = "v2") -> ml_collections.ConfigDict:
    """The recipe `arg`: v1 or v2."""
    c = base.published(arg, steps_v2=3_000_000, dropout_v1=0.0)
    c.model.hidden_size = 4096
    c.model.num_hidden_layers = 12
    c.model.num_attention_heads = 64
    c.model.intermediate_size = 16384
    c.train.microbatch_size = 8  # 8 twice is faster than 16 at once on a v5e, and takes less memory
    return c
