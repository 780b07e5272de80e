"""A mixture the slow, obvious way: every block from the first one on, on a line of fractions.

Written from the specification in the docstring of `albert_jax/data/mixture.py`.
"""

import math
from fractions import Fraction

from tests.data import slow_examples as slow

MIX = 7


def stride(D: int) -> int:
    """The number nearest to D / 1.618... that has no divisor with D; of two, the greater."""
    golden = D * (math.sqrt(5) - 1) / 2
    fitting = [g for g in range(1, D + 1) if math.gcd(g, D) == 1]
    return min(fitting, key=lambda g: (abs(g - round(golden)), -g))


def counts(weights: list[Fraction], blocks: int) -> list[list[int]]:
    """The places of each store in each of the first blocks."""
    shares = [1000 * weight / sum(weights) for weight in weights]
    D = math.lcm(*(share.denominator for share in shares))
    remainders = [share - math.floor(share) for share in shares]
    found = []
    for n in range(blocks):
        here = [math.floor(share) for share in shares]
        for whole in range(len(weights)):
            point = whole + Fraction(n * stride(D) % D, D)
            begin = Fraction(0)
            for store, remainder in enumerate(remainders):
                if begin <= point < begin + remainder:
                    here[store] += 1
                begin += remainder
        found.append(here)
    return found


def places(weights: list[Fraction], seed: int, blocks: int) -> list[tuple[int, int]]:
    """(store, number in its own stream) of every example of the first blocks."""
    taken = [0] * len(weights)
    found = []
    for n, here in enumerate(counts(weights, blocks)):
        assert sum(here) == 1000
        dealt = [
            (store, taken[store] + j) for store, count in enumerate(here) for j in range(count)
        ]
        of_block = slow.key(seed, MIX, n, 0)
        found += [dealt[slow.permuted(p, 1000, of_block)] for p in range(1000)]
        taken = [before + count for before, count in zip(taken, here, strict=True)]
    return found
