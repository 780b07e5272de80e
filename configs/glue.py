"""GLUE: the task is the argument, cola, sst-2, mrpc, sts-b, qqp, mnli, qnli, rte or wnli. GLUE's
diagnostic set AX is evaluated with mnli, where its folder lies beside MNLI's.

The hyper-parameters of Lan et al. 2020 (arXiv:1909.11942), table 14, chosen for xxlarge; the same
as in google-research/albert `run_glue.sh`. For the leaderboard RTE, STS-B and MRPC began with a
model that was fine-tuned on MNLI (--init=ITS_WORKDIR).

--config=configs/glue.py:mrpc --config.data.path=glue_data
"""

from typing import Any

import finetuning

# Learning rate, batch, the encoder's dropout, steps, warm-up.
TASKS = {
    "cola": (1e-5, 16, 0.0, 5336, 320),
    "sst-2": (1e-5, 32, 0.0, 20935, 1256),
    "mrpc": (2e-5, 32, 0.0, 800, 200),
    "sts-b": (2e-5, 16, 0.0, 3598, 214),
    "qqp": (5e-5, 128, 0.1, 14000, 1000),
    "mnli": (3e-5, 128, 0.0, 10000, 1000),
    "qnli": (1e-5, 32, 0.0, 33112, 1986),
    "rte": (3e-5, 32, 0.1, 800, 200),
    "wnli": (2e-5, 16, 0.1, 2000, 250),
}


def get_config(arg: str = "") -> Any:
    """The recipe of the task `arg`."""
    task = finetuning.chosen(TASKS, arg)
    rate, batch, dropout, steps, warmup = TASKS[task]
    return finetuning.finetuned(
        task, learning_rate=rate, batch=batch, steps=steps, warmup=warmup, dropout=dropout
    )
