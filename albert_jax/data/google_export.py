"""A token store's examples as the TFRecords that Google's script would have written.

In:  builders of both splits, with the rules of masking in them, and how often to go over the text.
Out: a folder of `train-00000-of-00007.tfrecord` and the like, with the tokenizer beside them. What
     google-research/albert's `run_pretraining.py` reads, with static or new masks (of
     `token_boundary`), and what `google_examples` reads.

Promise: the records of train are examples 0, 1, 2, ... of a run, epoch after epoch, in its order
and with its masks; those of validation are epoch 0 of the held-out text. The same store and options
give the same bytes. The folder appears under its name when it is whole.

Shapes: B examples, L sequence length, P masked slots, V vocabulary.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from albert_jax.data import google_examples as google
from albert_jax.data import pipeline, statistics, store
from albert_jax.data import tokenizer as tokenizer_lib
from albert_jax.errors import UserError
from albert_jax.progress import Progress

_A_FILE = 100_000  # examples
_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Split:
    """What becomes the files of a split.

    Attributes:
        name: "train" or "validation".
        builder: makes the examples.
        epochs: how often to go over the text, with other masks each time (`dupe_factor`).
    """

    name: str
    builder: pipeline.Builder
    epochs: int

    @property
    def examples(self) -> int:
        """How many records there will be."""
        return self.epochs * self.builder.examples_per_epoch

    def files(self) -> Iterator[tuple[str, range]]:
        """Name and examples of each file: all as long as the next, or longer by one."""
        count = max(1, -(-self.examples // _A_FILE))
        for number in range(count):
            first, last = (self.examples * place // count for place in (number, number + 1))
            yield f"{self.name}-{number:05d}-of-{count:05d}.tfrecord", range(first, last)


def export(splits: list[Split], spoken: tokenizer_lib.Tokenizer, output: Path) -> None:
    """Writes the folder.

    Raises:
        UserError: there is something under its name already.
    """
    if output.exists():
        raise UserError(f"--output={output} is there already; name a new folder, or remove it.")
    unfinished = output.with_name(output.name + store.UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / spoken.file_name).write_bytes(spoken.content)
    normalization = json.dumps(spoken.normalization.record()) + "\n"
    (unfinished / tokenizer_lib.NORMALIZATION_FILE).write_text(normalization, encoding="utf-8")
    starts_word_V = spoken.word_starts()
    starts_word_V[[spoken.cls_id, spoken.sep_id]] = True
    tf = pipeline.tensorflow()
    with Progress("export", sum(split.examples for split in splits), "example") as progress:
        for split in splits:
            for name, examples in split.files():
                with tf.io.TFRecordWriter(str(unfinished / name)) as writer:
                    for first in range(examples.start, examples.stop, _AT_ONCE):
                        chosen_B = np.arange(first, min(first + _AT_ONCE, examples.stop))
                        for record in records(split.builder.rows(chosen_B), starts_word_V):
                            writer.write(record)
                        progress.advance(len(chosen_B))
    unfinished.replace(output)


def records(batch: Mapping[str, np.ndarray], starts_word_V: np.ndarray) -> Iterator[bytes]:
    """Each row of a batch as a serialized `tf.train.Example`.

    Args:
        batch: as `examples.ExampleBuilder.rows` makes them.
        starts_word_V: bool, the piece begins a word; the special pieces do.
    """
    train = pipeline.tensorflow().train
    boundary_BL = starts_word_V[statistics.unmasked(batch)] & (batch["attention_mask"] == 1)
    labels_B = batch.get("sentence_order_labels", np.zeros(len(boundary_BL), np.int32))
    features = {
        "input_ids": batch["input_ids"],
        "input_mask": batch["attention_mask"],
        "segment_ids": batch["token_type_ids"],
        google.BOUNDARY: boundary_BL.astype(np.int32),
        **{name: batch[name] for name in google.MASKED_INTEGERS},
        google.LABELS: labels_B[:, None],
    }
    columns = {name: array.tolist() for name, array in features.items()}
    weights_BP = batch[google.WEIGHTS].tolist()
    for row in range(len(boundary_BL)):
        feature: dict[str, Any] = {
            name: train.Feature(int64_list=train.Int64List(value=values[row]))
            for name, values in columns.items()
        }
        feature[google.WEIGHTS] = train.Feature(float_list=train.FloatList(value=weights_BP[row]))
        example = train.Example(features=train.Features(feature=feature))
        yield example.SerializeToString(deterministic=True)
