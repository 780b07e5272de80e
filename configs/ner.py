"""Named entities: CoNLL files with a word and its tag a line.

Of the grid that Devlin et al. 2019 (arXiv:1810.04805), section A.3, searched: batch 32, rate 5e-5,
3 epochs. An uncased model (ALBERT's published ones) finds entities badly; take one that keeps
capitals.

--config=configs/ner.py --config.data.path=conll2003
"""

from typing import Any

import finetuning


def get_config(arg: str = "") -> Any:
    """`arg` is not used."""
    del arg
    # 3 epochs are 1,317 steps of CoNLL 2003's 14,041 sentences, of which warm-up is a tenth.
    c = finetuning.finetuned(
        "ner", learning_rate=5e-5, batch=32, steps=1317, warmup=130, length=128
    )
    c.train.epochs = 3.0
    return c
