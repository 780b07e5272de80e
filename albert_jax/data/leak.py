"""The leak meter: how much of a sentence objective's label the words alone give away.

A sentence objective should ask how two segments follow each other, not whether they have the same
topic (Lan et al. 2020, arXiv:1909.11942, section 3.1). A bag of words knows nothing of order, so
what a logistic regression on it can tell is leak. Two bags are tried:
    together   the words of the pair, and those that both segments have. The same whichever segment
               comes first: sentence order cannot be told from it, topic can.
    apart      the words of A, those of B, and those that both have. Order shows in this one too, by
               habits of language: a sentence cut in two has its full stop in the second half, and
               an answer rarely has the question mark.

In:  a token store, and which sentence objective.
Out: `Leak`s: how often each is right on held-out pairs, half of which have each label, so that
     chance is one half.

Needs scikit-learn, which comes with the `test` extra.

Shapes: N pairs, V vocabulary, L sequence length.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import scipy.sparse

from albert_jax.data.examples import ExampleBuilder, ExampleOptions, Vocabulary
from albert_jax.data.store import Store
from albert_jax.errors import UserError

_BATCH = 1024
_PENALTY = 0.01  # inverse strength of the L2 penalty; with less the thousands of words overfit


@dataclasses.dataclass(frozen=True)
class Leak:
    """What a bag of words makes of a sentence objective.

    Attributes:
        accuracy: on held-out pairs, chance being 0.5.
        pairs: how many those are.
    """

    accuracy: float
    pairs: int

    @property
    def standard_error(self) -> float:
        """Of the accuracy of one who guesses."""
        return 0.5 / math.sqrt(self.pairs)

    @property
    def deviation(self) -> float:
        """How many standard errors above chance."""
        return (self.accuracy - 0.5) / self.standard_error


def measure(
    data: Store, objective: str, single_sentence: str, max_seq_length: int, train_pairs: int
) -> dict[str, Leak]:
    """Fits on `train_pairs` examples of the train split, scores on the whole validation split.

    Args:
        data: the text.
        objective: "sop" or "nsp".
        single_sentence: what becomes of one sentence without a second: "split" or "random_next".
        max_seq_length: of the pairs, in tokens.
        train_pairs: how many to learn from; at most an epoch pays.

    Returns:
        "together" and "apart".

    Raises:
        UserError: scikit-learn is missing, or a split does not have both labels.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError(
            "the leak meter needs scikit-learn; pip install 'albert_jax[test]'."
        ) from None
    # Hardly anything is masked: what is, is put back below.
    options = ExampleOptions(
        max_seq_length=max_seq_length,
        max_predictions_per_seq=1,
        masked_lm_prob=0.15,
        ngram=1,
        short_seq_prob=0.1,
        seed=0,
        sentence_objective=objective,
        single_sentence=single_sentence,
    )
    vocabulary = Vocabulary.of(data.tokenizer())
    train, held_out = (
        ExampleBuilder(data.split(split), vocabulary, options) for split in ("train", "validation")
    )
    train_bags, train_labels_N = _pairs(train, train_pairs, data.vocab_size)
    bags, labels_N = _pairs(held_out, held_out.examples_per_epoch, data.vocab_size)
    leaks = {}
    for name, train_features in train_bags.items():
        classifier = LogisticRegression(C=_PENALTY, solver="liblinear")
        classifier.fit(train_features, train_labels_N)
        accuracy = float(np.mean(classifier.predict(bags[name]) == labels_N))
        leaks[name] = Leak(accuracy, len(labels_N))
    return leaks


def _pairs(
    builder: ExampleBuilder, pairs: int, vocab_size: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Both kinds of bags, sparse with a row a pair, and the labels, int [N], of the first `pairs`
    examples; as many of each label.
    """
    segments: tuple[list[Any], list[Any]] = ([], [])
    labels = []
    for first in range(0, pairs, _BATCH):
        batch = builder.batch(first, min(first + _BATCH, pairs))
        for kind in (0, 1):
            segments[kind].append(_words(batch, kind, vocab_size))
        labels.append(batch["sentence_order_labels"])
    labels_N = np.concatenate(labels)
    kept_N = _evened(labels_N)
    a_NV, b_NV = (scipy.sparse.vstack(parts).tocsr()[kept_N] for parts in segments)
    shared_NV = a_NV.multiply(b_NV)
    bags = {
        "together": scipy.sparse.hstack([(a_NV + b_NV).sign(), shared_NV]).tocsr(),
        "apart": scipy.sparse.hstack([a_NV, b_NV, shared_NV]).tocsr(),
    }
    return bags, labels_N[kept_N]


def _words(batch: dict[str, np.ndarray], kind: int, vocab_size: int) -> Any:
    """1 for every piece that a segment has, unmasked; sparse [B, V]."""
    ids_BL = batch["input_ids"].copy()
    rows, slots = np.nonzero(batch["masked_lm_weights"])
    ids_BL[rows, batch["masked_lm_positions"][rows, slots]] = batch["masked_lm_ids"][rows, slots]
    rows, places = np.nonzero((batch["token_type_ids"] == kind) & (batch["attention_mask"] > 0))
    counts: Any = scipy.sparse.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, ids_BL[rows, places])),
        shape=(len(ids_BL), vocab_size),
    )
    return counts.sign()


def _evened(labels_N: np.ndarray) -> np.ndarray:
    """The numbers of as many examples of each label, the first of each.

    Raises:
        UserError: there is only one label.
    """
    counts = np.bincount(labels_N, minlength=2)
    if not counts.all():
        raise UserError(f"all {len(labels_N)} pairs have the same label; prepare more text.")
    return np.sort(
        np.concatenate([np.flatnonzero(labels_N == label)[: counts.min()] for label in (0, 1)])
    )
