"""Pretraining examples as Google's script writes them: read in any order, with their masks or new
ones.

In:  TFRecord files of `create_pretraining_data.py` (of google-research/albert; that of
     google-research/bert writes the same but no `token_boundary`), and the tokenizer that made
     them; what `config.DataConfig` says of them.
Out: `GoogleExamples`, which a run takes in place of a token store, and of it a `RecordBuilder` a
     split, with the interface of `examples.ExampleBuilder`.

Promise: example i of a run is a pure function of (records, seed, i). Epoch and record come from the
permutation of `examples`, as a store's chunks do; there is no shuffle buffer. New masks take those
of the file away first, and are then drawn by the rules of `examples`, word for word, but that
`token_boundary` says where words begin; their stream is that of (seed, EXAMPLE, epoch, record).

A record is a `tf.train.Example` of int64 `input_ids`, `input_mask`, `segment_ids`, `token_boundary`
[L], `masked_lm_positions`, `masked_lm_ids` [P], `next_sentence_labels` [1] and float
`masked_lm_weights` [P]. Each is checked when it is read: the compiled code that masks checks
nothing.

Shapes: B examples, L sequence length, P masked slots, R records read, V vocabulary.
"""

import dataclasses
import fnmatch
import functools
import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from albert_jax import storage
from albert_jax.config import DataConfig
from albert_jax.data import examples, order, pipeline, statistics, store, tfrecord
from albert_jax.data import tokenizer as tokenizer_lib
from albert_jax.errors import UserError

FORMAT = "google_tfrecord"
BY_LENGTH = ("input_ids", "input_mask", "segment_ids")
BOUNDARY = "token_boundary"
MASKED_INTEGERS = ("masked_lm_positions", "masked_lm_ids")
WEIGHTS = "masked_lm_weights"
LABELS = "next_sentence_labels"

_PATTERN = "*.tfrecord*"  # of the files in a folder
_HELD_OUT = 50  # without files for it, one record of so many is held out
_SAMPLE = {"train": 1 << 15, "validation": 1 << 13}  # records whose pieces are counted
_AT_ONCE = 1024  # records


@dataclasses.dataclass(frozen=True)
class GoogleExamples:
    """The records that a run reads, for training and held out, and their tokenizer.

    Attributes:
        place: where they are, as it was given.
        spoken: the tokenizer that made the ids.
        records: of each split all that its files hold.
        numbers: of each split which records belong to it, int64 [N].
        length: L of every record.
        predictions: P of every record.
    """

    place: str
    spoken: tokenizer_lib.Tokenizer
    records: Mapping[str, tfrecord.Records]
    numbers: Mapping[str, np.ndarray]
    length: int
    predictions: int

    def tokenizer(self) -> tokenizer_lib.Tokenizer:
        """The tokenizer that made the ids."""
        return self.spoken

    @property
    def vocab_size(self) -> int:
        """V, number of pieces of the tokenizer."""
        return self.spoken.vocab_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the data: tokenizer, and each record by its place, length and
        checksum. Where the files lie and what they are called plays no part but for the order.
        """
        decisive = [FORMAT, self.spoken.sha256, self.spoken.normalization.record()]
        hashed = hashlib.sha256(json.dumps(decisive).encode())
        for split, numbers_N in self.numbers.items():
            records = self.records[split]
            hashed.update(f"{split} {len(numbers_N)}".encode())
            hashed.update(records.lengths_R[numbers_N].astype("<i8").tobytes())
            hashed.update(records.checksums_R[numbers_N].astype("<u4").tobytes())
        return hashed.hexdigest()

    @functools.cached_property
    def unigram_loss(self) -> float:
        """Cross-entropy of held-out text under the frequencies of train, nats per token; of a
        sample of some ten thousand records, always the same ones.
        """
        counts = {split: self._count(split) for split in self.numbers}
        return store.unigram_loss(counts["train"], counts["validation"])

    def builder(self, split: str, options: examples.ExampleOptions, masks: str) -> "RecordBuilder":
        """The examples of "train" or "validation"; see `RecordBuilder`."""
        return RecordBuilder(self, split, options, masks)

    def _count(self, split: str) -> np.ndarray:
        """How often each piece occurs, int64 [V]."""
        N = len(self.numbers[split])
        counts_V = np.zeros(self.vocab_size, np.int64)
        chosen = self.numbers[split][np.arange(0, N, max(1, -(-N // _SAMPLE[split])))]
        reader = _Reader(self, split, ("input_ids", "input_mask", *MASKED_INTEGERS, WEIGHTS))
        special = [self.spoken.cls_id, self.spoken.sep_id]
        for begin in range(0, len(chosen), _AT_ONCE):
            rows = reader.read(chosen[begin : begin + _AT_ONCE])
            ids_BL = statistics.unmasked(rows)
            counts_V += np.bincount(ids_BL[rows["input_mask"] == 1], minlength=self.vocab_size)
        counts_V[special] = 0
        return counts_V


def open_examples(data: DataConfig) -> GoogleExamples:
    """The records that a config names.

    Raises:
        UserError: no such files, broken ones, no tokenizer, or records of another shape than the
            config says.
    """
    train = tfrecord.index(_files("data.path", data.path))
    first = train.paths[0]
    length, predictions = _shape(train)
    if length != data.max_seq_length:
        raise UserError(
            f"data.max_seq_length={data.max_seq_length}, but the records of {first} are {length} "
            f"pieces long. Set it to {length}, or make records of the length you mean."
        )
    if data.masks == "stored" and predictions != data.max_predictions_per_seq:
        raise UserError(
            f"data.max_predictions_per_seq={data.max_predictions_per_seq}, but the records of "
            f"{first} have {predictions} masked slots. Set it to {predictions}, or draw masks "
            "anew with data.masks=new."
        )
    spoken = _tokenizer(data, first.parent)
    if data.validation_path:
        held_out = tfrecord.index(_files("data.validation_path", data.validation_path))
        numbers = {"train": np.arange(len(train)), "validation": np.arange(len(held_out))}
    else:
        held_out = train
        is_held_out_R = train.checksums_R % _HELD_OUT == 0
        numbers = {
            "train": np.flatnonzero(~is_held_out_R),
            "validation": np.flatnonzero(is_held_out_R),
        }
    return GoogleExamples(
        place=data.path,
        spoken=spoken,
        records={"train": train, "validation": held_out},
        numbers=numbers,
        length=length,
        predictions=predictions,
    )


def shape(path: str) -> tuple[int, int]:
    """L and P of the records of files, by the first of them.

    Raises:
        UserError: as `open_examples`.
    """
    return _shape(tfrecord.index(_files("data.path", path)[:1]))


def are_records(path: str) -> bool:
    """Whether a path, as `data.path`, names TFRecord files or a folder of them, judged by their
    names.
    """
    if Path(path).is_dir():
        return any(Path(path).glob(_PATTERN))
    named = [path, *(next(glob.iglob(part), "") for part in path.split(","))]  # noqa: PTH207
    return any(fnmatch.fnmatch(Path(name).name, _PATTERN) for name in named)


class RecordBuilder:
    """The examples of a split of records, any of them, in the order of a run.

    Args:
        data: the records.
        split: "train" or "validation".
        options: seed, objective, and for new masks the rules of masking.
        masks: "stored", those of the files, or "new".

    Attributes:
        examples_per_epoch: N, the number of records in the split.

    Raises:
        UserError: the split has no records.
    """

    def __init__(
        self, data: GoogleExamples, split: str, options: examples.ExampleOptions, masks: str
    ) -> None:
        self._numbers_N = data.numbers[split]
        self.examples_per_epoch = len(self._numbers_N)
        if not self.examples_per_epoch:
            raise UserError(
                f"data.path={data.place}: {len(data.records[split])} records are too few for one "
                f"of {_HELD_OUT} to be held out. Name others with data.validation_path."
                if split == "validation"
                else f"data.path={data.place} holds no records for training."
            )
        self._order = order.Order(np.array([0, self.examples_per_epoch]), options.seed)
        self._options = options
        self._length = data.length
        self._predictions = data.predictions
        self._pad_id = data.spoken.pad_id
        self._masker = None
        wanted = [*BY_LENGTH, *MASKED_INTEGERS, WEIGHTS]
        if options.sentence_objective != "none":
            wanted.append(LABELS)
        if masks == "new":
            wanted.append(BOUNDARY)
            self._predictions = options.max_predictions_per_seq
            self._masker = examples.Masker(examples.Vocabulary.of(data.spoken), options)
        self._reader = _Reader(data, split, wanted)

    def record_numbers(self, examples_B: np.ndarray) -> np.ndarray:
        """Which record of the split's files each example is, int64 [B]; -1 for padding."""
        return self._places(examples_B)[1]

    def rows(self, examples_B: np.ndarray) -> dict[str, np.ndarray]:
        """The numbered examples of the run; arguments and arrays are those of
        `examples.ExampleBuilder.rows`.

        Raises:
            UserError: a record that is damaged, or not of the shape and tokenizer it should be.
        """
        epochs_B, records_B = self._places(examples_B)
        real_B = records_B >= 0
        found = self._reader.read(records_B[real_B])
        batch = examples.empty_batch(len(examples_B), self._length, self._predictions)
        for array in batch.values():
            array[~real_B] = 0
        batch["attention_mask"][real_B] = found["input_mask"]
        batch["token_type_ids"][real_B] = found["segment_ids"]
        if LABELS in found:
            batch["sentence_order_labels"][real_B] = found[LABELS][:, 0]
        if self._masker is None:
            batch["input_ids"][real_B] = found["input_ids"]
            for name in (*MASKED_INTEGERS, WEIGHTS):
                batch[name][real_B] = found[name]
        else:
            batch["input_ids"][real_B] = statistics.unmasked(found)
            starts_word_BL = np.zeros(batch["input_ids"].shape, bool)
            starts_word_BL[real_B] = found[BOUNDARY] == 1
            self._masker.mask(batch, starts_word_BL, epochs_B, np.where(real_B, records_B, -1))
        batch["input_ids"][batch["attention_mask"] == 0] = self._pad_id
        if LABELS not in found:
            del batch["sentence_order_labels"]
        return batch

    def _places(self, examples_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and record of each example; -1 twice for padding."""
        epochs_B, places_B = self._order.places(np.asarray(examples_B, np.int64))
        return epochs_B, np.where(places_B < 0, -1, self._numbers_N[places_B])


class _Reader:
    """Reads records of a split, parsed by TensorFlow and checked."""

    def __init__(self, data: GoogleExamples, split: str, wanted: Sequence[str]) -> None:
        self._records = data.records[split]
        self._spoken = data.spoken
        self._shapes = {name: _width(name, data.length, data.predictions) for name in wanted}

    def read(self, numbers_R: np.ndarray) -> dict[str, np.ndarray]:
        """int32 or float32 [R, L], [R, P] or [R, 1] by name.

        Raises:
            UserError: a record that is not what it should be.
        """
        kinds = {name: np.float32 if name == WEIGHTS else np.int32 for name in self._shapes}
        if not len(numbers_R):
            return {name: np.zeros((0, self._shapes[name]), kinds[name]) for name in kinds}
        data_R = [self._records.read(int(number)) for number in numbers_R]
        tf = pipeline.tensorflow()
        features = {
            name: tf.io.FixedLenFeature([width], tf.float32 if name == WEIGHTS else tf.int64)
            for name, width in self._shapes.items()
        }
        try:
            parsed = tf.io.parse_example(tf.constant(data_R), features)
        except tf.errors.InvalidArgumentError:
            for number, data in zip(numbers_R, data_R, strict=True):
                if misfit := _misfit(data, self._shapes):
                    raise UserError(f"{self._records.where(number)} {misfit}") from None
            raise
        found = {name: array.numpy() for name, array in parsed.items()}
        self._check(numbers_R, found)
        return {name: array.astype(kinds[name], copy=False) for name, array in found.items()}

    def _check(self, numbers_R: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
        """Raises UserError for the first record whose values make no sense."""
        ids_RL, mask_RL = found["input_ids"], found["input_mask"]
        V = self._spoken.vocab_size
        lengths_R = mask_RL.sum(1)
        last_R = np.take_along_axis(ids_RL, np.clip(lengths_R - 1, 0, None)[:, None], 1)[:, 0]
        prefix_RL = np.arange(mask_RL.shape[1]) < lengths_R[:, None]
        begins = f"does not begin with {self._spoken.piece(self._spoken.cls_id)} and end with "
        rules = [
            (
                ((ids_RL < 0) | (ids_RL >= V)).any(1),
                f"has an id that is none of the tokenizer's {V}: it was made with another "
                "tokenizer. Name the right one with data.tokenizer.",
            ),
            ((mask_RL != prefix_RL).any(1), "has an input_mask that is not ones, then zeros."),
            (
                (lengths_R < 2)
                | (ids_RL[:, 0] != self._spoken.cls_id)
                | (last_R != self._spoken.sep_id),
                begins + f"{self._spoken.piece(self._spoken.sep_id)}: it was made with another "
                "tokenizer. Name the right one with data.tokenizer.",
            ),
        ]
        if "segment_ids" in found:
            segments_RL = found["segment_ids"]
            rules.append(
                (((segments_RL != 0) & (segments_RL != 1)).any(1), "has segments but 0 and 1.")
            )
        if WEIGHTS in found:
            real_RP = found[WEIGHTS] > 0
            targets_RP, positions_RP = found["masked_lm_ids"], found["masked_lm_positions"]
            outside_RP = (positions_RP < 0) | (positions_RP >= lengths_R[:, None])
            unknown_RP = (targets_RP < 0) | (targets_RP >= V)
            rules.append(
                (
                    ((outside_RP | unknown_RP) & real_RP).any(1),
                    "has a masked position outside the text, or an unknown piece there.",
                )
            )
        if LABELS in found:
            labels_R = found[LABELS][:, 0]
            rules.append(
                ((labels_R != 0) & (labels_R != 1), "has a label that is neither 0 nor 1.")
            )
        for broken_R, what in rules:
            if broken_R.any():
                number = int(numbers_R[np.argmax(broken_R)])
                raise UserError(f"{self._records.where(number)} {what}")


def _width(name: str, length: int, predictions: int) -> int:
    if name == LABELS:
        return 1
    return predictions if name in (*MASKED_INTEGERS, WEIGHTS) else length


def _files(field: str, patterns: str) -> list[Path]:
    """The files of a path, pattern or folder, or of several with commas; each once, in order."""
    found: list[Path] = []
    for pattern in [patterns] if Path(patterns).exists() else patterns.split(","):
        if storage.is_remote(pattern):
            raise UserError(
                f"{field}={pattern}: records are read from a disk; copy them there with gcloud "
                "storage cp, or mount the bucket."
            )
        path = Path(pattern)
        if path.is_dir():
            matching = sorted(file for file in path.glob(_PATTERN) if file.is_file())
            if not matching:
                raise UserError(f"{field}={pattern} is a folder without any {_PATTERN}.")
        else:
            matching = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
            if not matching:
                raise UserError(f"{field}={pattern}: no such file (seen from {Path.cwd()}).")
        found += [file for file in matching if file not in found]
    return found


def _shape(records: tfrecord.Records) -> tuple[int, int]:
    """L and P of the first record."""
    if not len(records):
        raise UserError(f"{records.paths[0]} and what there is beside it hold no records.")
    values = _values(records.read(0))
    sizes = {}
    for name in ("input_ids", "masked_lm_positions"):
        if name not in values:
            raise UserError(f"{records.where(0)} {_missing(name, values)}")
        sizes[name] = len(values[name][1])
    return sizes["input_ids"], sizes["masked_lm_positions"]


def _values(data: bytes) -> dict[str, tuple[str, Sequence[Any]]]:
    """Kind and values of each feature of a record; none where it is no `tf.train.Example`."""
    tf = pipeline.tensorflow()
    from google.protobuf import message

    try:
        features = tf.train.Example.FromString(data).features.feature
    except message.DecodeError:
        return {}
    found = {}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        found[name] = (kind or "nothing", getattr(feature, kind).value if kind else ())
    return found


def _misfit(data: bytes, shapes: Mapping[str, int]) -> str:
    """What keeps a record from being read; empty if nothing does."""
    values = _values(data)
    for name, width in shapes.items():
        if name not in values:
            return _missing(name, values)
        kind, numbers = values[name]
        wanted = "float_list" if name == WEIGHTS else "int64_list"
        if kind != wanted:
            return f"has {name} as {kind}, not {wanted}."
        if len(numbers) != width:
            return (
                f"has {len(numbers)} values of {name}, where the first record has {width}: all "
                "files of a run must be of one shape."
            )
    return ""


def _missing(name: str, values: Mapping[str, Any]) -> str:
    if not values:
        return "is no tf.train.Example: these are not pretraining examples of Google's script."
    there = f"has no feature {name}; it has {', '.join(sorted(values))}."
    if name == BOUNDARY:
        return f"{there} data.masks=new needs it; read the masks as they are: data.masks=stored."
    return there


def _tokenizer(data: DataConfig, folder: Path) -> tokenizer_lib.Tokenizer:
    """The tokenizer of the config, or the one beside the files."""
    path = Path(data.tokenizer)
    if not data.tokenizer:
        named = [folder / name for name in tokenizer_lib.FILES[1:]]
        found = [*sorted(folder.glob("*.model")), *(file for file in named if file.exists())]
        if len(found) != 1:
            raise UserError(
                f"data.tokenizer is empty, and beside the records in {folder} there "
                + (f"are {', '.join(file.name for file in found)}" if found else "is none")
                + ". Name the file (spiece.model, vocab.txt) that the records were made with."
            )
        path = found[0]
    return tokenizer_lib.Tokenizer.load(path, tokenizer_lib.Normalization.beside(path))
