"""How sequence length, batch size and masking rate change in the course of a run.

In:  a config's `data.schedule`, such as "0:128:4096,90000:512:1024" or, with masking rates,
     "0:128:4096:0.2,90000:512:1024:0.15", and the values that hold where it is silent.
Out: stages, one behind the other.

Batches are numbered through the run, and examples too: the first example of a batch is the sum of
the batches before it. A step takes the batch of its own number, but where batches were left out for
ever the next one; so a stage's batches are the same ones in every life of a run.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence

from albert_jax.errors import UserError

_FORM = "STEP:LENGTH:BATCH or STEP:LENGTH:BATCH:MASKED, such as 0:128:4096 or 0:128:4096:0.2"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Batches that are alike.

    Attributes:
        first_batch: number of its first batch, from 0.
        first_example: number of its first example, from 0.
        max_seq_length: L, pieces.
        global_batch_size: B, sequences.
        masked_lm_prob: share of a sequence's pieces to mask.
        max_predictions_per_seq: P; the same in all stages of one length, which so are one program.
    """

    first_batch: int
    first_example: int
    max_seq_length: int
    global_batch_size: int
    masked_lm_prob: float
    max_predictions_per_seq: int

    def example(self, batch: int) -> int:
        """Number of the first example of one of its batches."""
        return self.first_example + (batch - self.first_batch) * self.global_batch_size


def stage_of(stages: Sequence[Stage], batch: int) -> Stage:
    """The stage that a batch belongs to."""
    return stages[bisect.bisect_right([stage.first_batch for stage in stages], batch) - 1]


def steps(stages: Sequence[Stage], total: int) -> list[tuple[Stage, int]]:
    """The stages that a run of `total` steps reaches, and how many steps it makes in each."""
    ends = [*(stage.first_batch for stage in stages[1:]), total]
    made = [
        (stage, min(end, total) - stage.first_batch)
        for stage, end in zip(stages, ends, strict=True)
    ]
    return [(stage, count) for stage, count in made if count > 0]


def stages(
    schedule: str,
    max_seq_length: int,
    global_batch_size: int,
    masked_lm_prob: float,
    max_predictions_per_seq: int,
) -> tuple[Stage, ...]:
    """The stages of a schedule; one of the other values where it is empty.

    Masked slots keep their proportion to length and masking rate, rounded up.

    Args:
        schedule: as in `data.schedule`.
        max_seq_length, global_batch_size, masked_lm_prob, max_predictions_per_seq: of the config;
            the first is the most that a stage may have.

    Raises:
        UserError: a schedule that cannot be read or followed.
    """
    if not schedule.strip():
        usual = max_seq_length, global_batch_size, masked_lm_prob, max_predictions_per_seq
        return (Stage(0, 0, *usual),)
    parts = [_part(schedule, part.strip(), masked_lm_prob) for part in schedule.split(",")]
    steps = [step for step, *_ in parts]
    if steps[0] != 0 or sorted(set(steps)) != steps:
        raise UserError(
            f"data.schedule={schedule}: its steps are {', '.join(map(str, steps))}; the first must "
            "be 0, and each later than the one before."
        )
    for step, length, _, _ in parts:
        if length > max_seq_length:
            raise UserError(
                f"data.schedule={schedule}: the length {length} from step {step} on is more than "
                f"data.max_seq_length={max_seq_length}, at which validation is read; raise that, "
                "or lower the length."
            )
    room = max_predictions_per_seq / (max_seq_length * masked_lm_prob)
    found: list[Stage] = []
    for step, length, batch, masked in parts:
        highest = max(rate for _, other, _, rate in parts if other == length)
        # Rounded first: 77 slots are not to become 78 for a last digit of a division.
        slots = min(length, max(1, math.ceil(round(room * length * highest, 6))))
        first_example = found[-1].example(step) if found else 0
        found.append(Stage(step, first_example, length, batch, masked, slots))
    return tuple(found)


def _part(schedule: str, part: str, masked_lm_prob: float) -> tuple[int, int, int, float]:
    """(step, length, batch size, masking rate) as one part says them."""
    fields = part.split(":")
    try:
        step, length, batch = (int(field.replace("_", "")) for field in fields[:3])
        masked = float(fields[3]) if len(fields) == 4 else masked_lm_prob
        readable = 3 <= len(fields) <= 4
    except ValueError:
        readable = False
        step, length, batch, masked = 0, 0, 0, 0.0
    if not readable:
        raise UserError(f"data.schedule={schedule}: {part!r} is not {_FORM}.")
    for what, value, low, high in (
        ("step", step, 0, math.inf),
        ("length", length, 8, math.inf),
        ("batch", batch, 1, math.inf),
        ("masked share", masked, 0.01, 0.9),
    ):
        if not low <= value <= high:
            limit = f"be at least {low}" if high == math.inf else f"lie between {low} and {high}"
            raise UserError(
                f"data.schedule={schedule}: in {part!r}, the {what} {value} must {limit}."
            )
    return step, length, batch, masked
