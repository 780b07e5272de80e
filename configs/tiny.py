"""A very small ALBERT for a laptop: off the unigram plateau in minutes on two CPU cores.

For trying things out and for tests; `make demo` trains it. Not a published size.
"""

import ml_collections

from albert_jax import config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg` is not used."""
    del arg
    c = config.default_config()
    c.model.vocab_size = 0
    c.model.hidden_size = 128
    c.model.num_hidden_layers = 2
    c.model.num_attention_heads = 2
    c.model.intermediate_size = 512
    c.model.max_position_embeddings = 64
    c.model.initializer_range = (
        0.1  # about 1 / sqrt(hidden_size); 0.02 waits long on the unigram plateau
    )
    c.model.dtype = "float32"  # bfloat16 products are slow on CPUs
    c.model.remat = "auto"
    c.data.max_seq_length = 64
    c.data.max_predictions_per_seq = 10
    c.train.steps = 2_600
    c.train.global_batch_size = 32
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.beta2 = 0.98  # a short memory suits a short run; no bias correction, as released
    c.optimizer.warmup_steps = 200
    c.checkpoint.every_steps = 1_300
    c.eval.every_steps = 400
    return c
