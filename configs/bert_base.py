"""BERT base: 12 layers of 768, none shared, 110 M parameters with both heads.

AdamW, 1 M steps of 256 sequences, next-sentence prediction, single pieces masked, dropout 0.1
(Devlin et al. 2019, arXiv:1810.04805, sections 3.1 and A.2; google-research/bert). Of WordPiece, so
the store wants a vocab.txt: 30,522 pieces are the published uncased vocabulary; for one of your own
set model.vocab_size=0. Departures: masks are drawn anew in every epoch, where the published ten
copies were static, and all steps have length 512, where the first 900,000 had 128; the second line
below does as they did, in a fraction of the time.

--config=configs/bert_base.py
--config=configs/bert_base.py --config.data.schedule=0:128:256,900000:512:256
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
    c.model.model_type = "bert"
    c.model.vocab_size = 30_522
    c.model.embedding_size = 768
    c.model.num_hidden_groups = 12
    c.model.hidden_act = "gelu"
    c.model.hidden_dropout_prob = 0.1
    c.model.attention_probs_dropout_prob = 0.1
    c.model.sentence_objective = "nsp"
    c.data.ngram = 1
    c.data.whole_word_masking = False
    c.train.steps = 1_000_000
    c.train.global_batch_size = 256
    c.train.microbatch_size = 32
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 10_000
    return c
