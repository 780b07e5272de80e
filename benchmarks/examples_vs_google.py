"""Our examples beside those of Google's script, figure by figure, of the same sentences.

    python benchmarks/examples_vs_google.py --reference=FOLDER --tokenizer=spiece.model

The folder has the script's input (`sentences.txt`, a sentence a line, a blank line between
documents) and figures of what it made of it (`statistics.json`). Ours are made of the same
sentences with the script's rules (`single_sentence=random_next`), 60 copies with another seed each.
A copy draws one length for each of a few documents, so copies differ much more than examples do:
the standard error is that of the difference between our mean and one of as many copies as the
script made. Excepted: `NAMED`, where we differ on purpose.
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np

from albert_jax import cli
from albert_jax.data import examples, statistics, store, tokenizer

COPIES = 60
# Name, objective, length, predictions, n-gram, and how many copies the script made.
RUNS = (
    ("sop_128", "sop", 128, 20, 3, 1),
    ("sop_128_x12", "sop", 128, 20, 3, 12),
    ("sop_512_x4", "sop", 512, 77, 3, 4),
    ("nsp_128", "nsp", 128, 20, 1, 1),
)
# README, "Where ALBERT's original and this differ".
NAMED = {
    "masked runs of 0 words": "the first piece of B is a word, not the rest of A's last one, and "
    "n-grams end at a [SEP]: what was cut off from its word is masked less often",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of one run.

    Attributes:
        run: which of `RUNS`.
        figure: its name.
        ours: our mean over `COPIES`.
        theirs: the script's.
        standard_error: of the difference, by how our copies differ.
    """

    run: str
    figure: str
    ours: float
    theirs: float
    standard_error: float

    @property
    def deviation(self) -> float:
        """The difference in standard errors; rounding of the script's figures is none."""
        difference = max(0.0, abs(self.ours - self.theirs) - 5e-5)
        return difference / self.standard_error if difference else 0.0


def compare(reference: pathlib.Path, spoken: tokenizer.Tokenizer) -> list[Row]:
    theirs = json.loads((reference / "statistics.json").read_text(encoding="utf-8"))
    shard = read_sentences(reference / "sentences.txt", spoken)
    vocabulary = examples.Vocabulary.of(spoken)
    rows = []
    for name, objective, length, predictions, ngram, copies in RUNS:
        ours = [
            figures(shard, vocabulary, objective, length, predictions, ngram, seed)
            for seed in range(COPIES)
        ]
        wanted = named(theirs[name], copies)
        for figure, value in wanted.items():
            found = np.array([one[figure] for one in ours])
            error = float(found.std(ddof=1) * (1 / copies + 1 / COPIES) ** 0.5)
            rows.append(Row(name, figure, float(found.mean()), value, error))
    return rows


def read_sentences(path: pathlib.Path, spoken: tokenizer.Tokenizer) -> store.Shard:
    """The sentences as they are parted there, in one shard."""
    text = path.read_text(encoding="utf-8").strip()
    documents = [document.split("\n") for document in text.split("\n\n")]
    ids_T, sentences = spoken.encode_batch([line for lines in documents for line in lines])
    offsets = np.cumsum([0, *map(len, documents)])
    return store.Shard(ids_T.astype(np.uint16), sentences, offsets)


def figures(
    shard: store.Shard,
    vocabulary: examples.Vocabulary,
    objective: str,
    length: int,
    predictions: int,
    ngram: int,
    seed: int,
) -> dict[str, float]:
    """Of one copy of the text."""
    options = examples.ExampleOptions(
        max_seq_length=length,
        max_predictions_per_seq=predictions,
        masked_lm_prob=0.15,
        ngram=ngram,
        short_seq_prob=0.1,
        seed=seed,
        sentence_objective=objective,
        single_sentence="random_next",
    )
    builder = examples.ExampleBuilder([shard], vocabulary, options)
    batch = builder.rows(np.arange(builder.examples_per_epoch))
    found = statistics.of([batch], vocabulary, options.masked_lm_prob)
    return {"examples": found.examples, **found.figures()}


def named(theirs: dict, copies: int) -> dict[str, float]:
    """The script's figures under our names, the number of examples for one copy."""
    runs = theirs["words_in_a_masked_run"]
    flat = {name: value for name, value in theirs.items() if name != "words_in_a_masked_run"}
    flat["examples"] /= copies
    return flat | {f"masked runs of {words} words": share for words, share in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", required=True, type=pathlib.Path)
    parser.add_argument("--tokenizer", required=True, type=pathlib.Path)
    flags = parser.parse_args()
    cli.quiet_environment()
    spoken = tokenizer.Tokenizer.load(
        flags.tokenizer, tokenizer.Normalization.beside(flags.tokenizer)
    )
    print_table(compare(flags.reference, spoken))


def print_table(rows: list[Row]) -> None:
    header = f"{'run':<12} {'figure':<26} {'ours':>10} {'theirs':>10} {'SE':>8} {'difference':>11}"
    print(header)
    for row in rows:
        note = "  *" if row.figure in NAMED else ""
        print(
            f"{row.run:<12} {row.figure:<26} {row.ours:>10.4f} {row.theirs:>10.4f} "
            f"{row.standard_error:>8.4f} {row.deviation:>8.1f} SE{note}"
        )
    for figure, why in NAMED.items():
        print(f"* {figure}: {why}.")


if __name__ == "__main__":
    main()
