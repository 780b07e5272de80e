"""RoBERTa base: 12 layers of 768, none shared, 125 M parameters with the masked-word head.

AdamW with corrected moments and no clipping, 500,000 steps of 8,192 full-length sequences packed
over document ends, no second segment and no sentence objective, single pieces masked anew in every
epoch (Liu et al. 2019, arXiv:1907.11692, section 4 and table 9; facebookresearch/fairseq). Of
byte-level BPE, so the store wants a tokenizer.json: 50,265 pieces are the published vocabulary; for
one of your own set model.vocab_size=0. The first position is row 2 of 514, as in the released
weights.

--config=configs/roberta_base.py
"""

from typing import Any

import ml_collections

from albert_jax import config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg` is not used."""
    del arg
    return published()


def published() -> Any:
    """What both published sizes share, sized as base."""
    c = config.default_config()
    c.model.model_type = "roberta"
    c.model.vocab_size = 50_265
    c.model.embedding_size = 768
    c.model.num_hidden_groups = 12
    c.model.hidden_act = "gelu"
    c.model.hidden_dropout_prob = 0.1
    c.model.attention_probs_dropout_prob = 0.1
    c.model.max_position_embeddings = 514
    c.model.position_offset = 2
    c.model.pad_token_id = 1
    c.model.type_vocab_size = 1
    c.model.pooler = False
    c.model.layer_norm_eps = 1e-5
    c.model.sentence_objective = "none"
    c.data.ngram = 1
    c.data.whole_word_masking = False
    c.train.steps = 500_000
    c.train.global_batch_size = 8192
    c.train.microbatch_size = 32
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 6e-4
    c.optimizer.warmup_steps = 24_000
    c.optimizer.clip_norm = 0.0
    c.optimizer.beta2 = 0.98
    c.optimizer.bias_correction = True
    c.optimizer.decay_from_warmup = True
    return c
