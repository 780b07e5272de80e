"""What a run may be told: every config field with its unit and reason, its checks, and how files
and flags set it.

A config file has `get_config(arg="")`, starts from `default_config()` and returns it changed;
`--config=FILE[:ARG] --config.section.field=value` names one and overrides it (`load`). `resolve`
turns the result into frozen dataclasses and refuses what is unknown, of the wrong type or
impossible, naming field, value and what would be right. Only the commands see the ConfigDict;
everything below them takes the dataclasses.

Field names of `model` are those of ALBERT's published config.json.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections

from albert_jax import curriculum
from albert_jax.errors import UserError

ACTIVATIONS = ("gelu_new", "gelu", "relu")
MODEL_TYPES = ("albert", "bert", "roberta", "distilbert")
OBJECTIVES = ("sop", "nsp", "none")
DTYPES = ("bfloat16", "float32")
REMAT = ("auto", "none", "dots", "full")
UNROLL = ("auto", "yes", "no")
ATTENTION = ("auto", "xla", "flash", "splash", "cudnn")
AUTO = -1  # what a number that may be chosen for the user reads as when it is written `auto`
OPTIMIZERS = ("lamb", "adamw")
SINGLE_SENTENCE = ("split", "random_next")
DATA_FORMATS = ("store", "google_tfrecord")
MASKS = ("stored", "new")
SHUFFLES = ("global", "shard")
TABLE_KINDS = ("classification", "multi_label", "regression")
ENDS = ("top", "bottom")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The encoder and its heads. Defaults: ALBERT base, v2."""

    model_type: str = "albert"  # whose heads and file formats; the sizes below say all the rest
    vocab_size: int = 30_000  # pieces; 0 = the token store's
    embedding_size: int = 128  # E; a projection to hidden_size follows where they differ
    project_embeddings: bool = False  # where they do not differ as well, as Transformers' ALBERT
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_hidden_groups: int = 1  # layer i uses parameter set floor(i * groups / layers)
    inner_group_num: int = 1  # blocks inside one layer, each with its own parameters
    attention_groups: int = 0  # sets of attention parameters; 0 = num_hidden_groups
    ffn_groups: int = 0  # sets of feed-forward parameters; 0 = num_hidden_groups
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu_new"  # gelu_new: tanh approximation; gelu: erf; relu
    hidden_dropout_prob: float = 0.0  # v2; v1 has 0.1 (xxlarge: 0)
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout_prob: float = 0.1  # before a fine-tuned head
    max_position_embeddings: int = 512  # rows of the table
    position_offset: int = 0  # the row of a sequence's first position; RoBERTa: 2
    type_vocab_size: int = 2  # kinds of segment; 0 = no table (DistilBERT)
    pad_token_id: int = 0  # RoBERTa: 1
    pooler: bool = True  # dense layer and tanh over [CLS]; RoBERTa and DistilBERT train without
    initializer_range: float = 0.02  # sigma of the normal, cut at two sigma
    layer_norm_eps: float = 1e-12
    sentence_objective: str = "sop"  # sop: order; nsp: next sentence; none: no sentence head
    dtype: str = "bfloat16"  # of matrix products; masters, losses and statistics are float32
    remat: str = "dots"  # recompute in the backward pass: none; dots: all but products; full: all;
    # auto: the least that the device's memory allows
    unroll: str = "auto"  # the loop over layers written out: yes; no; auto: on a CPU without remat
    attention: str = "auto"  # xla; flash, splash: Pallas kernels for TPUs; cudnn: on GPUs; auto

    def __post_init__(self) -> None:
        """Raises UserError for values that make no model."""
        for name in (
            "embedding_size",
            "hidden_size",
            "num_hidden_layers",
            "num_hidden_groups",
            "inner_group_num",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            _at_least("model", self, name, 1)
        for name in ("vocab_size", "type_vocab_size", "position_offset", "pad_token_id"):
            _at_least("model", self, name, 0)
        for name in (
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "classifier_dropout_prob",
        ):
            _between("model", self, name, 0.0, 0.9)
        _one_of("model", self, "model_type", MODEL_TYPES)
        _positive("model", self, "initializer_range")
        _positive("model", self, "layer_norm_eps")
        _one_of("model", self, "hidden_act", ACTIVATIONS)
        _one_of("model", self, "sentence_objective", OBJECTIVES)
        _one_of("model", self, "dtype", DTYPES)
        _one_of("model", self, "remat", REMAT)
        _one_of("model", self, "unroll", UNROLL)
        _one_of("model", self, "attention", ATTENTION)
        if self.hidden_size % self.num_attention_heads:
            fits = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            nearest = sorted(fits, key=lambda n: abs(n - self.num_attention_heads))[:2]
            raise UserError(
                f"model.num_attention_heads={self.num_attention_heads} does not divide "
                f"model.hidden_size={self.hidden_size}; nearest that do: "
                f"{' and '.join(map(str, sorted(nearest)))}."
            )
        if self.sentence_objective != "none" and not self.pooler:
            raise UserError(
                f"model.pooler=False, but model.sentence_objective={self.sentence_objective} is "
                "predicted from the pooler; set it to True, or the objective to none."
            )
        for name in ("num_hidden_groups", "attention_groups", "ffn_groups"):
            _between("model", self, name, 0, self.num_hidden_layers, "model.num_hidden_layers")
        # 0 means "as num_hidden_groups"; frozen, so set past the guard.
        object.__setattr__(
            self, "attention_groups", self.attention_groups or self.num_hidden_groups
        )
        object.__setattr__(self, "ffn_groups", self.ffn_groups or self.num_hidden_groups)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text, and how examples are cut and masked."""

    path: str = ""  # a token store, made by albert_jax.prepare; or several with commas, mixed
    weights: str = ""  # of several stores, their shares of the examples, as 0.7,0.3; empty = equal
    store_fingerprint: str = ""  # filled in at the start: a run stays with the data it began with
    schedule: str = ""  # STEP:LENGTH:BATCH[:MASKED] with commas, such as 0:128:4096,90000:512:1024:
    # from which step on batches are of what length, size and masking rate; empty = all alike
    max_seq_length: int = 512  # pieces, special tokens included; of validation in any case
    max_predictions_per_seq: int = 77  # 15 % of 512; the released script's default was 20
    masked_lm_prob: float = 0.15
    ngram: int = 3  # longest run of words masked together; p(n) is proportional to 1/n
    short_seq_prob: float = 0.1  # share of documents cut to a random shorter length
    whole_word_masking: bool = True  # False: every piece is a word of its own (BERT, RoBERTa)
    single_sentence: str = "split"  # a chunk of one sentence; random_next: as released, leaks topic
    packing: bool = False  # several short pairs in a row, which do not see each other; for corpora
    # of short documents: less padding, so fewer steps an epoch. Held-out text is never packed
    max_pairs_per_seq: int = 32  # in a row, with packing
    shuffle: str = "global"  # an epoch's order: of all examples; shard: of a few shards' at a time,
    # for a corpus larger than the disk
    shuffle_shards: int = 8  # that are mixed with each other; `shuffle=shard` only
    cache_gib: float = 0.0  # of tokens of stores in a bucket that are kept on the local disk, with
    # shuffle=shard; 0 = all of them
    seed: int = 0
    format: str = "store"  # google_tfrecord: path = files, with globs and commas, or a folder of
    # examples that Google's script made, cut and paired already; none of the above but the length,
    # the seed (of their order) and what masks say plays a part
    masks: str = "stored"  # of google_tfrecord: stored in the files; new: drawn anew every epoch
    validation_path: str = (
        ""  # of google_tfrecord: files to evaluate on; empty = 2 % of the records
    )
    # are held out, by their checksums (copies of their text with other masks stay in training)
    tokenizer: str = (
        ""  # of google_tfrecord: spiece.model or vocab.txt; empty = that beside the files
    )

    def __post_init__(self) -> None:
        """Raises UserError for values that make no examples."""
        _one_of("data", self, "format", DATA_FORMATS)
        _one_of("data", self, "masks", MASKS)
        _at_least("data", self, "max_seq_length", 8)
        _between(
            "data", self, "max_predictions_per_seq", 1, self.max_seq_length, "data.max_seq_length"
        )
        _between("data", self, "masked_lm_prob", 0.01, 0.9)
        _between("data", self, "ngram", 1, 10)
        _between("data", self, "short_seq_prob", 0.0, 1.0)
        _one_of("data", self, "single_sentence", SINGLE_SENTENCE)
        _at_least("data", self, "max_pairs_per_seq", 1)
        _one_of("data", self, "shuffle", SHUFFLES)
        _at_least("data", self, "shuffle_shards", 1)
        _at_least("data", self, "cache_gib", 0.0)
        _between("data", self, "seed", 0, 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, and how much at once."""

    steps: int = 125_000
    epochs: float = 0.0  # of a fine-tuning: passes over its rows; 0 = `steps` holds
    global_batch_size: int = 4096  # sequences a step, over all devices
    microbatch_size: int = 0  # sequences one device handles at once; 0 = its whole share; -1 or
    # auto = the most that its memory allows
    seed: int = 0  # initial values and dropout
    max_skipped_batches: int = 10  # whose loss is not finite; one more stops the run
    stall_minutes: float = 15.0  # without any progress, until the run ends itself; 0 = never

    def __post_init__(self) -> None:
        """Raises UserError for values that make no run."""
        _at_least("train", self, "steps", 1)
        _at_least("train", self, "epochs", 0.0)
        _at_least("train", self, "global_batch_size", 1)
        _at_least("train", self, "microbatch_size", AUTO)
        _between("train", self, "seed", 0, 2**31 - 1)
        _at_least("train", self, "max_skipped_batches", 0)
        _at_least("train", self, "stall_minutes", 0.0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """LAMB or AdamW as released with ALBERT, and the schedule too; or as its later relatives."""

    name: str = "lamb"
    learning_rate: float = 0.00176  # peak; 0.005 * sqrt(batch / 32768) for LAMB
    warmup_steps: int = 3_125  # from 0 to the peak; the decay to 0 counts from step 0
    weight_decay: float = 0.01  # not on LayerNorm and biases
    clip_norm: float = 1.0  # global norm of the gradients; 0 = no clipping
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6  # outside the root
    bias_correction: bool = False  # of the moments (Adam as published); True: RoBERTa, DistilBERT
    decay_from_warmup: bool = False  # True: the decay to 0 begins where the warm-up ends
    layer_decay: float = 1.0  # each layer's rate is that of the next one times this; 1 = all equal
    layer_decay_from: str = "top"  # where the rate is whole: top, rates fall downwards; bottom
    layer_decay_share: float = 0.0  # of the run, after which all rates are equal; 0 = never
    embedding_rate: float = 1.0  # times the rate, for the embeddings and their projection
    head_rate: float = 1.0  # times the rate, for all that stands on the encoder

    def __post_init__(self) -> None:
        """Raises UserError for values that make no optimizer."""
        _one_of("optimizer", self, "name", OPTIMIZERS)
        _positive("optimizer", self, "learning_rate")
        _between("optimizer", self, "learning_rate", 0.0, 1.0)
        _at_least("optimizer", self, "warmup_steps", 0)
        _at_least("optimizer", self, "weight_decay", 0.0)
        _at_least("optimizer", self, "clip_norm", 0.0)
        _between("optimizer", self, "beta1", 0.0, 0.99999)
        _between("optimizer", self, "beta2", 0.0, 0.999999)
        _between("optimizer", self, "layer_decay", 0.01, 1.0)
        _one_of("optimizer", self, "layer_decay_from", ENDS)
        _between("optimizer", self, "layer_decay_share", 0.0, 1.0)
        _at_least("optimizer", self, "embedding_rate", 0.0)
        _at_least("optimizer", self, "head_rate", 0.0)
        _positive("optimizer", self, "epsilon")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """A student that learns to answer as a teacher does (Sanh et al. 2019, arXiv:1910.01108)."""

    teacher: str = ""  # a run's folder; empty = no teacher, and nothing else here plays a part
    teacher_step: int = 0  # which checkpoint; 0 = the newest, filled in at the start
    temperature: float = 2.0  # divides both models' scores before the softmax
    kl_weight: float = 5.0  # of temperature^2 * KL(teacher || student) over the masked pieces
    masked_lm_weight: float = 2.0
    cosine_weight: float = 1.0  # of 1 - cosine of the last hidden states, over all real pieces
    student_layers: str = ""  # teacher layers that start the student, as 0,2,4; empty = fresh

    def __post_init__(self) -> None:
        """Raises UserError for values that make no loss."""
        _at_least("distillation", self, "teacher_step", 0)
        _positive("distillation", self, "temperature")
        for name in ("kl_weight", "masked_lm_weight", "cosine_weight"):
            _at_least("distillation", self, name, 0.0)
        if not all(part.strip().isdigit() for part in self.student_layers.split(",") if part):
            raise UserError(
                f"distillation.student_layers={self.student_layers!r} is no list of layers; "
                "write numbers from 0 with commas between, as 0,2,4."
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """`student_layers` as numbers."""
        return tuple(int(part) for part in self.student_layers.split(",") if part)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What a fine-tuning learns, and out of which files; pretraining has no task."""

    name: str = ""  # cola ... wnli (GLUE), squad, race, swag, xnli, ner, retrieval, table
    train: str = (
        ""  # file under data.path, or several with commas; empty = as the task is given out
    )
    validation: str = ""
    test: str = ""
    kind: str = "classification"  # of a table: what its label is
    text: str = "text"  # of a table: the column that is read
    text_pair: str = ""  # and the one beside it; empty = none
    label: str = "label"  # and the one to be predicted
    labels: str = ""  # names of the classes with commas, or as JSON; empty = found in train
    max_query_length: int = 64  # pieces of a question
    doc_stride: int = 128  # pieces from the begin of one window of a long text to that of the next
    max_answer_length: int = 30  # pieces
    n_best: int = 20  # answers that are weighed against each other
    answer_head: str = "plain"  # plain: two scores a piece; conditional: the end given the start,
    # and whether there is an answer (XLNet's, for SQuAD 2.0)
    null_score_threshold: float = 0.0  # how much better no answer must be than the best one
    can_be_impossible: bool = False  # filled in at the start: some questions have no answer
    head: str = ""  # filled in at the start: which of model.finetuning.HEADS

    def __post_init__(self) -> None:
        """Raises UserError for values that make no task."""
        _one_of("task", self, "kind", TABLE_KINDS)
        _one_of("task", self, "answer_head", ("plain", "conditional"))
        for name in ("max_query_length", "doc_stride", "max_answer_length", "n_best"):
            _at_least("task", self, name, 1)

    @property
    def label_names(self) -> tuple[str, ...]:
        """`labels`, one by one."""
        if not self.labels.startswith("["):
            return tuple(name.strip() for name in self.labels.split(",") if name.strip())
        try:
            return tuple(map(str, json.loads(self.labels)))
        except ValueError as error:
            raise UserError(f"task.labels={self.labels!r} is not JSON: {error}") from None


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """Changed copies of a fine-tuning's training rows; their labels stay as they are."""

    synonyms: str = ""  # a WordNet folder, or a TSV of a word and its synonyms; empty = none
    paraphrases: str = ""  # a TSV of a text and another that says the same; empty = none
    model: str = ""  # a run of ours whose masked-word head proposes words in context; empty = none
    rate: float = 0.1  # of the words that are replaced
    copies: int = 1  # changed copies of each row, beside the row itself
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for values that change nothing or everything."""
        _between("augmentation", self, "rate", 0.01, 0.9)
        _between("augmentation", self, "copies", 1, 100)
        _between("augmentation", self, "seed", 0, 2**31 - 1)


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A grid: a fine-tuning is run once for every combination of the values, with commas."""

    learning_rate: str = ""
    global_batch_size: str = ""
    epochs: str = ""

    def __post_init__(self) -> None:
        """Raises UserError for what is no list of numbers."""
        for name in ("learning_rate", "global_batch_size", "epochs"):
            self.values(name)

    def values(self, name: str) -> tuple[float, ...]:
        """The numbers of a field; none where it is not swept."""
        text = getattr(self, name)
        try:
            return tuple(float(part) for part in text.split(",") if part.strip())
        except ValueError:
            raise UserError(
                f"sweep.{name}={text!r} is no list of numbers; write them with commas between."
            ) from None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 on one of them = whatever is left."""

    data: int = -1  # whole copies of the model, each with its share of the batch
    fsdp: int = 1  # shares the batch too, and splits masters and optimizer state
    tensor: int = 1  # splits heads and feed-forward columns inside a layer

    def __post_init__(self) -> None:
        """Raises UserError for values that make no mesh."""
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in sizes.items():
            if size != -1 and size < 1:
                raise UserError(
                    f"mesh.{name}={size} is no number of devices; give 1 or more, or -1."
                )
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"mesh: only one axis can be -1 (whatever is left); got {sizes}.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = 5_000  # 0 = not by steps
    every_minutes: float = 30.0  # 0 = not by time
    keep: int = 3  # the newest ones; the best by validation loss is kept besides

    def __post_init__(self) -> None:
        """Raises UserError for values that make no sense."""
        _at_least("checkpoint", self, "every_steps", 0)
        _at_least("checkpoint", self, "every_minutes", 0.0)
        _at_least("checkpoint", self, "keep", 1)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How often figures are written."""

    every_steps: int = 100  # metrics.jsonl, TensorBoard and the progress line; means since the last

    def __post_init__(self) -> None:
        """Raises UserError for values that make no sense."""
        _at_least("log", self, "every_steps", 1)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How often the held-out text is looked at."""

    every_steps: int = 5_000  # 0 = only at the end
    steps: int = 50  # batches of the held-out split; 0 = all of it (fine-tuning: always all)
    patience: int = 0  # evaluations without a better one, after which the run ends; 0 = never

    def __post_init__(self) -> None:
        """Raises UserError for values that make no sense."""
        _at_least("eval", self, "every_steps", 0)
        _at_least("eval", self, "steps", 0)
        _at_least("eval", self, "patience", 0)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, whole. The sections are documented where they are defined."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    augmentation: AugmentationConfig = dataclasses.field(default_factory=AugmentationConfig)
    sweep: SweepConfig = dataclasses.field(default_factory=SweepConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        """Raises UserError where two sections contradict each other."""
        positions = self.model.max_position_embeddings - self.model.position_offset
        if self.data.max_seq_length > positions:
            offset = self.model.position_offset
            raise UserError(
                f"data.max_seq_length={self.data.max_seq_length} is longer than "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
                + (f" - model.position_offset={offset}" if offset else "")
                + "; lower the first or raise the second."
            )
        if self.model.sentence_objective != "none" and self.model.type_vocab_size < 2:
            raise UserError(
                f"model.type_vocab_size={self.model.type_vocab_size} cannot tell two segments "
                "apart; "
                "set it to 2, or model.sentence_objective to none."
            )
        if self.data.format == "google_tfrecord" and self.model.type_vocab_size < 2:
            raise UserError(
                f"model.type_vocab_size={self.model.type_vocab_size}, but the examples of "
                "data.format=google_tfrecord have two segments; set it to 2, or read a store."
            )
        if self.data.format == "google_tfrecord":
            for name in ("packing", "schedule", "weights"):
                if value := getattr(self.data, name):
                    raise UserError(
                        f"data.{name}={value} is for token stores, but data.format=google_tfrecord "
                        "has examples that are cut already; leave it out."
                    )
            if self.data.shuffle != "global":
                raise UserError(
                    f"data.shuffle={self.data.shuffle} is for token stores; the examples of "
                    "data.format=google_tfrecord come in one order of all: set it to global."
                )
        if self.data.packing and (self.task.name or self.model.sentence_objective == "none"):
            why = (
                f"task.name={self.task.name}: a fine-tuning's rows are batched by length"
                if self.task.name
                else "model.sentence_objective=none: its rows are full of sentences anyway"
            )
            raise UserError(f"data.packing=True does not go with {why}; set it to False.")

        if self.data.schedule and self.task.name:
            raise UserError(
                f"data.schedule={self.data.schedule} is for pretraining; task.name="
                f"{self.task.name} takes its lengths from its rows."
            )
        _ = self.stages  # a schedule that cannot be followed is refused at once

    @property
    def stages(self) -> tuple[curriculum.Stage, ...]:
        """Of the training batches; a single one without `data.schedule`."""
        data = self.data
        return curriculum.stages(
            data.schedule,
            data.max_seq_length,
            self.train.global_batch_size,
            data.masked_lm_prob,
            data.max_predictions_per_seq,
        )

    def at(self, stage: curriculum.Stage) -> "Config":
        """The config of a run whose batches are all like those of a stage."""
        data = dataclasses.replace(
            self.data,
            schedule="",
            max_seq_length=stage.max_seq_length,
            max_predictions_per_seq=stage.max_predictions_per_seq,
            masked_lm_prob=stage.masked_lm_prob,
        )
        train = dataclasses.replace(self.train, global_batch_size=stage.global_batch_size)
        return dataclasses.replace(self, data=data, train=train)

    def with_seeds(self, train: int, data: int) -> "Config":
        """The config of a run that differs in its seeds alone."""
        return dataclasses.replace(
            self,
            train=dataclasses.replace(self.train, seed=train),
            data=dataclasses.replace(self.data, seed=data),
        )

    def to_json(self) -> str:
        """The config.json of a workdir: sections and fields in order, two spaces deep."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


_SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "distillation": DistillationConfig,
    "task": TaskConfig,
    "augmentation": AugmentationConfig,
    "sweep": SweepConfig,
    "mesh": MeshConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
    "eval": EvalConfig,
}

# What may differ when a run goes on in the same workdir: where it runs and how often it saves or
# is looked at, never what it computes. (A store that moved is the same by its fingerprint.)
CHANGEABLE = frozenset(
    {"data.path", "data.validation_path", "data.tokenizer", "data.cache_gib"}
    | {"train.microbatch_size", "model.remat", "model.unroll", "model.attention"}
    | {"train.max_skipped_batches", "train.stall_minutes"}
    | {f"mesh.{axis}" for axis in ("data", "fsdp", "tensor")}
    | {f"checkpoint.{field.name}" for field in dataclasses.fields(CheckpointConfig)}
)


def default_config() -> Any:
    """A ConfigDict of every field's default, locked so that a misspelt one is refused as written.

    Typed Any because its attributes are made as it runs.
    """
    sections = {
        section: {field.name: field.default for field in dataclasses.fields(kind)}
        for section, kind in _SECTIONS.items()
    }
    return ml_collections.ConfigDict(sections).lock()


def load(file_and_arg: str, overrides: Sequence[str] = ()) -> Config:
    """The checked config of `FILE[:ARG]` with `section.field=value` overrides.

    Raises:
        UserError: no such file, no get_config, a field that does not exist, a value that is none.
    """
    return _overridden(_run_config_file(file_and_arg), overrides)


def load_default(overrides: Sequence[str] = ()) -> Config:
    """The checked config of `section.field=value` overrides and defaults; raises as `load` does."""
    return _overridden(default_config(), overrides)


def _overridden(values: ml_collections.ConfigDict, overrides: Sequence[str]) -> Config:
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--config.{override} has no value; write --config.{path}=VALUE.")
        _set(values, path, text)
    return resolve(values)


def resolve(values: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """The typed config of a (nested) dictionary; fields left out keep their defaults.

    Raises:
        UserError: an unknown section or field, a wrong type, an impossible value.
    """
    sections = {}
    for section, fields in dict(values).items():
        if section not in _SECTIONS:
            raise UserError(_unknown(section, "section", list(_SECTIONS)))
        known = {field.name: field.type for field in dataclasses.fields(_SECTIONS[section])}
        typed = {}
        for name, value in dict(fields).items():
            if name not in known:
                raise UserError(
                    _unknown(f"{section}.{name}", "field", [f"{section}.{k}" for k in known])
                )
            typed[name] = _typed(f"{section}.{name}", value, known[name])
        sections[section] = _SECTIONS[section](**typed)
    return Config(**sections)


def read_workdir(workdir: pathlib.Path) -> Config:
    """The config a run was started with, out of its config.json.

    Raises:
        UserError: no run there, or a file that is not a config.
    """
    path = workdir / "config.json"
    try:
        return resolve(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(
            f"{workdir} holds no run (no config.json); --workdir of albert_jax.train?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a config: {error}") from None


def differing_fields(
    ours: Config, theirs: Config, allowed: frozenset[str] = CHANGEABLE
) -> list[str]:
    """`section.field: theirs there, ours now` for each field that differs and may not."""
    ours_flat, theirs_flat = _flatten(ours), _flatten(theirs)
    return [
        f"{name}: {theirs_flat[name]!r} there, {value!r} now"
        for name, value in ours_flat.items()
        if name not in allowed and value != theirs_flat[name]
    ]


def recipe_warnings(config: Config) -> list[str]:
    """What in a valid config is far from the recipe that is known to work, with the value that
    fits.

    The rule ties LAMB's learning rate and warm-up to the batch (You et al. 2020, arXiv:1904.00962,
    table 4: rate 0.005 at 32,768 and falling with the root, warm-up share proportional to the
    batch); ALBERT's 0.00176 and 3,125 of 125,000 steps at 4,096 are on it. Longer runs kept those
    3,125 warm-up steps.
    """
    warnings = []
    first, steps = config.stages[0], config.train.steps
    batch = first.global_batch_size  # of the steps that the peak of the rate is among
    named = "data.schedule's first batch" if config.data.schedule else "train.global_batch_size"
    if config.optimizer.warmup_steps >= steps:
        warnings.append(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} of train.steps={steps}: the "
            f"learning rate never reaches its peak; {max(steps // 20, 1)} would leave time to "
            "train."
        )
    elif config.optimizer.name == "lamb":
        rate = 0.005 * math.sqrt(batch / 32768)
        ratio = config.optimizer.learning_rate / rate
        if not 0.5 <= ratio <= 2.0:
            warnings.append(
                f"optimizer.learning_rate={config.optimizer.learning_rate:g} is {ratio:.2g} "
                f"times what LAMB's rule gives for {named}={batch}; {rate:.3g} fits."
            )
        warmup = max(1, round(min(steps * batch / 163_840, 3_125)))
        given = config.optimizer.warmup_steps
        # A rule made for batches of thousands asks for a step or two at small ones; longer does no
        # harm there.
        if given < warmup / 2 or (given > 4 * warmup and warmup >= 100):
            warnings.append(
                f"optimizer.warmup_steps={given} is far from LAMB's rule for {steps} steps of "
                f"{batch} sequences; {warmup} fits."
            )
    if config.task.name:
        return warnings  # nothing is masked
    warnings += [
        f"data.schedule: what holds from step {stage.first_batch} on is never reached in "
        f"train.steps={steps}."
        for stage in config.stages
        if stage.first_batch >= steps
    ]
    for share in dict.fromkeys(stage.masked_lm_prob for stage in config.stages):
        if not 0.1 <= share <= 0.25:
            named = "a masked share of data.schedule" if config.data.schedule else ""
            warnings.append(
                f"{named or 'data.masked_lm_prob'}={share:g} is far from the usual 0.15."
            )
    # The slots of all stages are in proportion to these.
    share = config.data.masked_lm_prob
    room = config.data.max_predictions_per_seq / config.data.max_seq_length
    fits = round(0.15 * config.data.max_seq_length)
    if room < 0.8 * min(share, 0.15):
        warnings.append(
            f"data.max_predictions_per_seq={config.data.max_predictions_per_seq} masks at most "
            f"{room:.1%} of "
            f"data.max_seq_length={config.data.max_seq_length}; {fits} would mask 15 %."
        )
    elif room > 2 * max(share, 0.15):
        warnings.append(
            f"data.max_predictions_per_seq={config.data.max_predictions_per_seq} leaves most "
            "masked slots empty at "
            f"data.max_seq_length={config.data.max_seq_length} and masked_lm_prob={share:g}; "
            f"{fits} is enough."
        )
    return warnings


def _run_config_file(file_and_arg: str) -> ml_collections.ConfigDict:
    name, _, arg = file_and_arg.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        raise UserError(
            f"--config={file_and_arg}: no file {name} (seen from {pathlib.Path.cwd()})."
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={file_and_arg}: {name} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    # A config file may import its neighbours, wherever the command is started from.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        return module.get_config(arg)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={file_and_arg}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)


def _set(values: Any, path: str, text: str) -> None:
    section, _, name = path.partition(".")
    if section not in values:
        raise UserError(_unknown(section, "section", list(values)))
    if not name or name not in values[section]:
        raise UserError(_unknown(path, "field", [f"{section}.{key}" for key in values[section]]))
    kind = type(values[section][name])
    values[section][name] = _typed(path, _parse(text, kind), kind)


def _parse(text: str, kind: type) -> object:
    """`text` as bool, int or float where it reads as one and is wanted; otherwise as it is."""
    if kind is int and text == "auto":
        return AUTO
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        for convert in (int, float):
            try:
                return convert(text.replace("_", ""))
            except ValueError:
                continue
    return text


def _typed(path: str, value: object, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wants = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
        raise UserError(f"{path}={value!r} is not {wants}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path}={value!r} is not a finite number.")
    return value


def _unknown(name: str, what: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"config has no {what} {name}; did you mean {near[0]}?"
    return f"config has no {what} {name}; there are: {', '.join(known)}."


def _flatten(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
    }


def _at_least(section: str, owner: object, name: str, low: float) -> None:
    value = getattr(owner, name)
    if value < low:
        raise UserError(f"{section}.{name}={value} is too small; it must be at least {low}.")


def _positive(section: str, owner: object, name: str) -> None:
    value = getattr(owner, name)
    if not value > 0:
        raise UserError(f"{section}.{name}={value} must be more than 0.")


def _between(
    section: str, owner: object, name: str, low: float, high: float, high_name: str = ""
) -> None:
    value = getattr(owner, name)
    if not low <= value <= high:
        limit = f"{high_name}={high}" if high_name else f"{high}"
        raise UserError(
            f"{section}.{name}={value} is out of range; it must lie between {low} and {limit}."
        )


def _one_of(section: str, owner: object, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in choices:
        raise UserError(f"{section}.{name}={value!r} is none of: {', '.join(choices)}.")
