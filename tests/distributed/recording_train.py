"""albert_jax.train at a walking pace, which writes down the training examples that it builds.

python recording_train.py FILE ARGUMENTS...: a line of FILE for each batch: [first, last, how many].
"""

import json
import sys
import threading
import time

import numpy as np

from albert_jax import cli, train
from albert_jax.data import examples

SECONDS_A_BATCH = 0.2  # so that there is time to stop the run, or to kill it


def record(path: str) -> None:
    build, one_at_a_time = examples.ExampleBuilder.rows, threading.Lock()

    def rows(self: examples.ExampleBuilder, examples_B: np.ndarray) -> dict[str, np.ndarray]:
        if len(examples_B) and self._options.short_seq_prob:  # 0 for held-out text
            span = [int(examples_B[0]), int(examples_B[-1]), len(examples_B)]
            with one_at_a_time, open(path, "a", encoding="utf-8") as file:  # noqa: PTH123
                file.write(json.dumps(span) + "\n")
                time.sleep(SECONDS_A_BATCH)
        return build(self, examples_B)

    examples.ExampleBuilder.rows = rows


if __name__ == "__main__":
    record(sys.argv.pop(1))
    cli.run(train.main)
