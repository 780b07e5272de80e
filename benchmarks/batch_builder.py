"""Examples a second on one core: the builder alone, through tf.data, and the slow Python version.

    python benchmarks/batch_builder.py [--store=STORE] [--batch=256]

All figures come from one run on one core: the process is bound to it where the system can do that,
and every thread of tf.data with it. Without a store, 32 M tokens of random text with sentences and
documents of realistic lengths are made in memory. Freed memory is kept, as `train` does on a CPU.
Each figure is the median of five, taken in turns. The last column is how much longer a batch takes
through tf.data than from the builder alone.

After that, packing: the same text as documents of one to six sentences, its pairs a second in
packed rows beside those in rows of their own, and how much of the rows is padding.

Last, for each order of the examples, a pipeline in a process of its own over 1 G tokens, which are
the shards again and again, memory-mapped: how long its first batch takes, and what memory it takes
besides the store (anonymous memory beyond that of the imports).
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from albert_jax import cli
from albert_jax.data import examples, order, pipeline, store
from albert_jax.training import cpu_memory

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the tests' reference
from tests.data import slow_examples

REPEATS = 5
EXAMPLES = 16_384  # at a time, in 16 batches at least: more than a pipeline makes ahead
TOKENS = 32_000_000
LARGE = 1_000_000_000
VOCAB_SIZE = 30_000
SHAPES = ((128, 20), (512, 77))  # length, predictions: 15 %


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", help="a token store; its train split is read")
    parser.add_argument("--batch", type=int, default=256, help="examples a call")
    flags = parser.parse_args()
    cli.quiet_environment()
    cpu_memory.keep_freed()
    print(bind_to_one_core())
    if flags.store:
        opened = store.open_store(flags.store)
        shards = list(opened.split("train"))
        vocabulary = examples.Vocabulary.of(opened.tokenizer())
    else:
        shards, vocabulary = synthetic()
    sentences = sum(len(shard.sentences) - 1 for shard in shards)
    tokens = sum(len(shard.tokens) for shard in shards)
    print(f"{tokens:,} tokens, {sentences:,} sentences, batches of {flags.batch}")
    print(
        f"{'':20}{'mean length':>12}{'builder':>12}{'tf.data':>12}{'Python':>10}"
        f"{'builder/Python':>16}{'tf.data/Python':>16}{'tf.data/builder':>17}{'tf.data adds':>16}"
    )
    for objective in ("sop", "nsp", "none"):
        for length, predictions in SHAPES:
            options = examples.ExampleOptions(
                max_seq_length=length,
                max_predictions_per_seq=predictions,
                masked_lm_prob=0.15,
                ngram=3,
                short_seq_prob=0.0,
                seed=0,
                sentence_objective=objective,
                single_sentence="split",
            )
            builder = examples.ExampleBuilder(shards, vocabulary, options)
            bare, piped, slow = median_rates(
                of_builder(builder, flags.batch),
                of_pipeline(builder, flags.batch),
                of_slow(shards[0], vocabulary, options),
            )
            mean_length = builder.batch(0, 1000)["attention_mask"].sum() / 1000
            print(
                f"{objective:>5}, length {length:<6}{mean_length:12.0f}{bare:10,.0f}/s"
                f"{piped:10,.0f}/s{slow:8,.0f}/s{bare / slow:12,.0f} : 1"
                f"{piped / slow:12,.0f} : 1{piped / bare:17.2f}"
                f"{(1 / piped - 1 / bare) * flags.batch * 1e6:9,.0f} us/batch"
            )
    begin = time.perf_counter()
    examples.ExampleBuilder(shards, vocabulary, options)
    print(
        f"index of all chunks: {sentences / (time.perf_counter() - begin) / 1e6:.0f} M sentences/s"
    )
    packing(shards, vocabulary, options)
    with tempfile.TemporaryDirectory() as folder:
        write(shards, pathlib.Path(folder))
        for shuffle in order.SHUFFLES:
            for length, predictions in SHAPES:
                shape = (length, predictions, flags.batch)
                work = (folder, len(shards), max(1, LARGE // tokens), vocabulary, shuffle, *shape)
                spawned = multiprocessing.get_context("spawn")
                with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawned) as process:
                    chunks, seconds, mib = process.submit(alone, *work).result()
                print(
                    f"shuffle={shuffle}, length {length}, {chunks:,} chunks of 1 G tokens: first "
                    f"batch after {seconds:.2f} s, {mib:.0f} MiB over the store"
                )


def write(shards: list[store.Shard], folder: pathlib.Path) -> None:
    for number, shard in enumerate(shards):
        for array in store.ARRAYS:
            np.save(folder / f"{number}.{array}.npy", getattr(shard, array))


def alone(
    folder: str,
    count: int,
    repeats: int,
    vocabulary: examples.Vocabulary,
    shuffle: str,
    length: int,
    predictions: int,
    batch: int,
) -> tuple[int, float, float]:
    """Chunks of the repeated shards, seconds to the first batch, MiB after 400 of them."""
    cli.quiet_environment()

    def mapped(number: int, array: str) -> np.ndarray:
        return np.load(f"{folder}/{number}.{array}.npy", mmap_mode="r", allow_pickle=False)

    shards = [
        store.Shard(*(mapped(number, array) for array in store.ARRAYS)) for number in range(count)
    ]
    options = examples.ExampleOptions(
        length, predictions, 0.15, 3, 0.0, 0, "sop", "split", shuffle=shuffle
    )
    # Imports and compiled code, which a process has once, whatever it reads.
    warm = examples.ExampleBuilder(shards[:1], vocabulary, options)
    next(pipeline.training_batches([pipeline.Stage(warm, batch, [(0, batch)])], 0, 1))
    before = anonymous_mib()
    begin = time.perf_counter()
    builder = examples.ExampleBuilder(shards * repeats, vocabulary, options)
    stream = pipeline.training_batches([pipeline.Stage(builder, batch, [(0, batch)])], 0, 10**9)
    next(stream)
    seconds = time.perf_counter() - begin
    for _ in range(400):
        next(stream)
    used = anonymous_mib() - before
    stream.close()
    return builder.examples_per_epoch, seconds, used


def anonymous_mib() -> float:
    """Memory of this process that is not pages of files; 0 where the system does not say."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def packing(
    shards: list[store.Shard], vocabulary: examples.Vocabulary, options: examples.ExampleOptions
) -> None:
    rng = np.random.default_rng(1)
    short = []
    for shard in shards:
        ends = np.cumsum(rng.integers(1, 7, len(shard.sentences)))
        ends = ends[ends < len(shard.sentences) - 1]
        documents = np.concatenate([[0], ends, [len(shard.sentences) - 1]])
        short.append(dataclasses.replace(shard, documents=documents))
    for length, predictions in SHAPES:
        chosen = dataclasses.replace(
            options,
            sentence_objective="sop",
            max_seq_length=length,
            max_predictions_per_seq=predictions,
        )
        alone = examples.ExampleBuilder(short, vocabulary, chosen)
        begin = time.perf_counter()
        packed = examples.ExampleBuilder(
            short, vocabulary, dataclasses.replace(chosen, packing=True)
        )
        seconds, found = time.perf_counter() - begin, packed.packing()
        pairs = found.pairs / found.rows
        rates = median_rates(of_builder(packed, 256), of_builder(alone, 256))
        print(
            f"packing, length {length}: padding {found.padding_without:.1%} without, "
            f"{found.padding_with:.1%} with, {pairs:.1f} pairs a row; {rates[0] * pairs:,.0f} "
            f"pairs/s packed, {rates[1]:,.0f} alone, {rates[0] * pairs / rates[1]:.2f} : 1; "
            f"index of {found.pairs:,} pairs in {seconds:.1f} s"
        )


def bind_to_one_core() -> str:
    if not hasattr(os, "sched_setaffinity"):
        return "this system cannot bind a process to a core: all cores in use"
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return f"bound to core {core} of {os.cpu_count()}; load before: {os.getloadavg()[0]:.1f}"


def synthetic() -> tuple[list[store.Shard], examples.Vocabulary]:
    rng = np.random.default_rng(0)
    shards = []
    for _ in range(4):
        count = TOKENS // 4 // 24
        lengths = np.clip(rng.lognormal(2.97, 0.65, count).astype(np.int64), 1, 400)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        sizes = np.clip(rng.lognormal(4.0, 1.2, count // 50).astype(np.int64), 1, 10_000)
        ends = np.cumsum(sizes)
        documents = np.concatenate([[0], ends[ends < count], [count]])
        tokens = rng.integers(5, VOCAB_SIZE, offsets[-1], dtype=np.uint16)
        shards.append(store.Shard(tokens, offsets, documents))
    starts_word = rng.random(VOCAB_SIZE) < 0.75
    control = np.arange(VOCAB_SIZE) < 5
    return shards, examples.Vocabulary(VOCAB_SIZE, 2, 3, 4, starts_word, control)


def median_rates(*works: Callable[[], int]) -> list[float]:
    """Examples a second of each; they take turns. A work returns how many it made."""
    rates: list[list[float]] = [[] for _ in works]
    for _ in range(REPEATS):
        for work, mine in zip(works, rates, strict=True):
            work()  # takes what a pipeline made ahead, or lets it do so
            begin = time.perf_counter()
            made = work()
            mine.append(made / (time.perf_counter() - begin))
    return [statistics.median(mine) for mine in rates]


def batches_at_a_time(batch: int) -> int:
    return max(16, -(-EXAMPLES // batch))


def of_builder(builder: examples.ExampleBuilder, batch: int) -> Callable[[], int]:
    batches = batches_at_a_time(batch)

    def work() -> int:
        for step in range(batches):
            builder.batch(step * batch, (step + 1) * batch)
        return batches * batch

    return work


def of_pipeline(builder: examples.ExampleBuilder, batch: int) -> Callable[[], int]:
    """Batches of a pipeline that has begun already."""
    stage = pipeline.Stage(builder, batch, [(0, batch)])
    stream = pipeline.training_batches([stage], 0, 10**9)
    batches = batches_at_a_time(batch)

    def work() -> int:
        for _ in range(batches):
            next(stream)
        return batches * batch

    return work


def of_slow(
    shard: store.Shard, vocabulary: examples.Vocabulary, options: examples.ExampleOptions
) -> Callable[[], int]:
    """Makes the examples alone: the chunks of some documents are found beforehand."""
    documents = [
        [
            shard.tokens[shard.sentences[s] : shard.sentences[s + 1]].tolist()
            for s in range(
                shard.documents[d], min(shard.documents[d + 1], shard.documents[d] + 300)
            )
        ]
        for d in range(min(40, len(shard.documents) - 1))
    ]
    chunks = slow_examples.chunks([documents], options)[:100]

    def work() -> int:
        for number, chunk in enumerate(chunks):
            stream = slow_examples.SplitMix64(number)
            slow_examples.example(chunk, [documents], vocabulary, options, stream)
        return len(chunks)

    return work


if __name__ == "__main__":
    main()
