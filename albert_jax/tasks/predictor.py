"""A model for use: text in, answers out, whatever kind of model it is and whoever made it.

    model = albert_jax.load("runs/mrpc")
    model.classify(["It rains."], ["Rain falls."])
    albert_jax.load("runs/base").embed(["It rains."])

In:  a run of ours, a folder of Transformers or a checkpoint of Google's; texts of any length.
Out: plain dictionaries, as `albert_jax.predict` prints them.

Texts are batched by length, which changes no answer. A text longer than the model reads is read in
overlapping windows, whose answers are joined; of a pair, the longer text is cut, and the answer
says so.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from scipy import special
from seqeval.metrics.sequence_labeling import get_entities

from albert_jax import config as config_lib
from albert_jax.config import Config
from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.interop import initial, models
from albert_jax.model import finetuning
from albert_jax.tasks import answering, batches, course, explanation, fill_mask, ner
from albert_jax.tasks import task as task_lib
from albert_jax.tasks.task import Features, Outputs
from albert_jax.training import program, run_folder, sharding

_MOST_LENGTHS = 512  # and no longer, where a run does not say


class Predictor:
    """A model and its tokenizer, ready for use.

    Args:
        path: of the model.
        step: which checkpoint of a run; by default the newest, or a fine-tuning's best.
        batch_size: sequences at once.

    Raises:
        UserError: no model there, or one without a tokenizer.
    """

    def __init__(
        self, path: str | pathlib.Path, step: int | None = None, batch_size: int = 32
    ) -> None:
        self.path = run_folder.fetched(path)
        self._model = models.read(self.path, step)
        found = models.read_tokenizer(self.path, self._model)
        if found is None:
            raise UserError(f"{path} has no tokenizer; albert_jax.convert --tokenizer adds one.")
        self.tokenizer: Tokenizer = found
        self.head, self.labels = self._model.head.kind, self._model.head.labels
        theirs = self._model.config
        longest = theirs.max_position_embeddings - theirs.position_offset
        length, task = min(longest, _MOST_LENGTHS), config_lib.TaskConfig()
        if models.kind(self.path) == "albert_jax":
            run = config_lib.read_workdir(self.path)
            length, task = run.data.max_seq_length, run.task
        self._config = Config(
            model=dataclasses.replace(theirs, attention="auto"),
            data=config_lib.DataConfig(max_seq_length=length, max_predictions_per_seq=1),
            train=config_lib.TrainConfig(
                global_batch_size=-(-batch_size // jax.device_count()) * jax.device_count()
            ),
            mesh=config_lib.MeshConfig(data=-1),
            task=task,
        )
        self._programs: dict[str, tuple[program.Program, Any]] = {}

    def classify(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Class, classes or number of each text, or of each text beside its pair.

        Returns:
            {"text", "label", "probability", "probabilities"}; with several labels at once "labels"
            instead of "label"; of a number {"text", "value"}.
        """
        self._needs("sequence_classification", "classify")
        parts, cut = self._windows(texts, pairs)
        logits = self._joined(parts, self._run(self.head, parts.features)["logits"])
        answers = []
        for number, scores_K in enumerate(logits):
            answer: dict[str, Any] = {"text": texts[number]}
            if pairs is not None:
                answer["text_pair"] = pairs[number]
                if cut[number]:
                    answer["truncated"] = True
            answers.append(answer | self._class(scores_K))
        return answers

    def answer(self, questions: Sequence[str], contexts: Sequence[str]) -> list[dict[str, Any]]:
        """The best answers to each question in its context; "" is that there is none.

        Returns:
            {"question", "answer", "probability", "start", "end", "others"}; start and end count
            characters of the context.
        """
        options = self._config.task
        self._needs(("question_answering", "question_answering_conditional"), "answer")
        shown = [
            answering.windows(
                self.tokenizer,
                question,
                context,
                self._config.data.max_seq_length,
                options.max_query_length,
                options.doc_stride,
            )
            for question, context in zip(questions, contexts, strict=True)
        ]
        flat = [window for windows in shown for window in windows]
        features = answering.windows_features(flat)
        outputs, first, answers = self._run(self.head, features), 0, []
        for question, context, windows in zip(questions, contexts, shown, strict=True):
            mine = {name: rows[first : first + len(windows)] for name, rows in outputs.items()}
            first += len(windows)
            ranked = answering.best_answers(
                windows, mine, context, options, options.can_be_impossible
            )
            named = []
            for one in ranked:
                start = context.index(one.text, one.start)  # behind white space
                end = start + len(one.text)
                sure = float(one.probability)
                named.append({"answer": one.text, "probability": sure, "start": start, "end": end})
            answers.append({"question": question, **named[0], "others": named[1:5]})
        return answers

    def tag(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Entities of each text: {"text", "entities": [{"type", "text", "start", "end",
        "probability"}]}; the probability is the mean over the words.
        """
        self._needs("token_classification", "tag")
        spans = [[found.span() for found in task_lib.WORD.finditer(text)] for text in texts]
        words = [
            [text[start:stop] for start, stop in each]
            for text, each in zip(texts, spans, strict=True)
        ]
        here = pathlib.Path("text")
        sentences = [ner.Sentence(each, [], [1] * len(each), here) for each in words]
        features, places, _ = ner.featurise(
            sentences,
            self.labels,
            self.tokenizer,
            self._config.data.max_seq_length,
            task_lib.Problems(),
        )
        logits = self._run(self.head, features)["logits"]
        answers = []
        for text, each, where in zip(texts, spans, places, strict=True):
            tags, sure = [], []
            for place in where:
                if place is None:
                    tags.append("O")
                    sure.append(0.0)
                    continue
                shares_K = special.softmax(logits[place.row][place.piece].astype(np.float64))
                tags.append(self.labels[int(shares_K.argmax())])
                sure.append(float(shares_K.max()))
            entities = [
                {
                    "type": kind,
                    "text": text[each[first][0] : each[last][1]],
                    "start": each[first][0],
                    "end": each[last][1],
                    "probability": float(np.mean(sure[first : last + 1])),
                }
                for kind, first, last in get_entities(tags)
            ]
            answers.append({"text": text, "entities": entities})
        return answers

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """A vector of length one for each text, float32 [texts, D]: the mean over its pieces."""
        parts, _ = self._windows(texts, None)
        rows = self._run("embedding", parts.features)["logits"]
        joined_BD = np.asarray(rows, np.float32).reshape(-1, self._config.model.hidden_size)
        sums = np.zeros((len(texts), joined_BD.shape[1]), np.float32)
        np.add.at(sums, parts.text_of, joined_BD)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        return sums / np.maximum(norms, 1e-12)

    def similarity(self, texts: Sequence[str], others: Sequence[str]) -> list[float]:
        """The cosine of the vectors of each two."""
        both = self.embed([*texts, *others])
        pairs = zip(both[: len(texts)], both[len(texts) :], strict=True)
        return [float(one_D @ other_D) for one_D, other_D in pairs]

    def fill_mask(self, texts: Sequence[str], top_k: int = 5) -> list[list[list[fill_mask.Guess]]]:
        """For each text, for each of its masks, the `top_k` most probable pieces.

        Raises:
            UserError: a text without a mask, or too long; a model without a masked-word head.
        """
        if "masked_lm" not in self._model.params:
            raise UserError(f"{self.path} has no masked-word head; it is a {self._kind()}.")
        encoded = [
            fill_mask.encode(self.tokenizer, text, self._config.data.max_seq_length)
            for text in texts
        ]
        run, params = self._program("")
        return fill_mask.fill(run, params, self.tokenizer, encoded, top_k)

    def explain(self, text: str, pair: str | None = None) -> explanation.Explanation:
        """Which words made the decision on a text, or on a pair.

        Raises:
            UserError: a text of more pieces than the model reads.
        """
        self._needs("sequence_classification", "explain")
        run, params = self._program(self.head)
        return explanation.explain(
            run.model,
            params,
            self.tokenizer,
            text,
            pair,
            self._config.data.max_seq_length,
            self.labels,
        )

    def _class(self, scores_K: np.ndarray) -> dict[str, Any]:
        if len(self.labels) <= 1:
            return {"value": float(scores_K[0])}
        several = self._model.head.multi_label
        squash: Callable[[np.ndarray], np.ndarray] = special.expit if several else special.softmax
        shares = dict(zip(self.labels, map(float, squash(scores_K)), strict=True))
        if several:
            chosen = [name for name, share in shares.items() if share > 0.5]
            return {"labels": chosen, "probabilities": shares}
        best = max(shares, key=lambda name: shares[name])
        return {"label": best, "probability": shares[best], "probabilities": shares}

    def _windows(
        self, texts: Sequence[str], pairs: Sequence[str] | None
    ) -> tuple["_Windows", list[bool]]:
        """Texts as rows of pieces, long ones as several; and which pairs had to be cut."""
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts and {len(pairs)} beside them make no pairs")
        longest = self._config.data.max_seq_length
        room = longest - task_lib.special_pieces(self.tokenizer, pair=pairs is not None)
        sequences, text_of, cut = [], [], []
        ids, at = self.tokenizer.encode_batch(texts)
        for number in range(len(texts)):
            mine = ids[at[number] : at[number + 1]].tolist()
            if pairs is not None:
                beside = self.tokenizer.encode(pairs[number])
                cut.append(task_lib.truncate_pair(mine, beside, room))
                sequences.append(task_lib.join(self.tokenizer, mine, beside))
                text_of.append(number)
                continue
            cut.append(False)
            for start in _starts(len(mine), room):
                sequences.append(task_lib.join(self.tokenizer, mine[start : start + room]))
                text_of.append(number)
        return _Windows(task_lib.features(sequences), np.asarray(text_of, np.int64)), cut

    def _joined(self, parts: "_Windows", logits: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The mean over the windows of each text, float64 [K]."""
        if not len(logits):
            return []
        stacked = np.stack([np.asarray(row, np.float64) for row in logits])
        counts = np.bincount(parts.text_of)
        sums = np.zeros((len(counts), stacked.shape[1]))
        np.add.at(sums, parts.text_of, stacked)
        return list(sums / counts[:, None])

    def _run(self, head: str, features: Features) -> Outputs:
        if not len(features):
            return {"logits": []}
        run, params = self._program(head)
        lengths = batches.lengths([features], self._config.data.max_seq_length)
        return course.predict(run, params, features, lengths, self.tokenizer.pad_id)

    def _program(self, head: str) -> tuple[program.Program, Any]:
        """The program with a head ("" for pretraining's), and the model's parameters for it."""
        if head not in self._programs:
            task = dataclasses.replace(self._config.task, head=head)
            if head == self.head:
                task = dataclasses.replace(task, labels=json.dumps(list(self.labels)))
            cfg = dataclasses.replace(self._config, task=task)
            if head:
                cfg = dataclasses.replace(
                    cfg, model=dataclasses.replace(cfg.model, sentence_objective="none")
                )
            run = program.build(cfg, sharding.make_mesh(cfg, jax.devices()))
            like = run.abstract_state.params
            params = {name: initial.placed(like[name], self._model.params[name]) for name in like}
            self._programs[head] = (run, params)
        return self._programs[head]

    def _needs(self, heads: str | Iterable[str], job: str) -> None:
        wanted = (heads,) if isinstance(heads, str) else tuple(heads)
        if self.head not in wanted:
            raise UserError(
                f"{job} wants a model fine-tuned for {wanted[0].replace('_', ' ')}; {self.path} is "
                f"a {self._kind()}. albert_jax.finetune makes one."
            )

    def _kind(self) -> str:
        named = self.head.replace("_", " ")
        return f"{named} model" if self.head in finetuning.HEADS else f"model with {named} alone"


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Rows, and int64 [R] the number of the text that each is of."""

    features: Features
    text_of: np.ndarray


def _starts(pieces: int, room: int) -> Iterable[int]:
    """Where windows begin: half a window apart, the last one ending with the text."""
    if pieces <= room:
        return [0]
    return [*range(0, pieces - room, max(room // 2, 1)), pieces - room]
