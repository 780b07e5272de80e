"""What a bag of words can tell of each sentence objective's label on the same text.

Sentence order with split single sentences must stay at chance where the bag does not say which
segment came first; next-sentence prediction, and sentence order with the released treatment of
single sentences (`random_next`), do not.

  python benchmarks/leak_meter.py --data=stores/mine --length=128
"""

import argparse

from albert_jax.data import leak, store

OBJECTIVES = (("sop", "split"), ("sop", "random_next"), ("nsp", "split"))


def main() -> None:
    """Prints one line an objective."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="STORE", help="a token store")
    parser.add_argument("--length", type=int, default=128, help="data.max_seq_length")
    parser.add_argument("--pairs", type=int, default=30_000, help="to learn from")
    args = parser.parse_args()
    data = store.open_store(args.data)
    print(f"{'objective':24}{'held-out pairs':>15}{'together':>20}{'apart':>20}")
    for objective, single in OBJECTIVES:
        found = leak.measure(data, objective, single, args.length, args.pairs)
        name = f"{objective}, {single}" if objective == "sop" else objective
        figures = "".join(
            f"{f'{one.accuracy:.1%} ({one.deviation:+.1f} SE)':>20}" for one in found.values()
        )
        print(f"{name:24}{found['together'].pairs:>15,}{figures}", flush=True)
    print("chance: 50 %; SE: standard errors above it. together: which words the pair has, and")
    print("which both segments have; apart: which words each segment has")


if __name__ == "__main__":
    main()
