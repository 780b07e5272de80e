"""Attention for TPUs: our own Pallas kernel `flash`, and JAX's library kernel `splash`.

In:  queries, keys and values as the projections leave them, [B, L, H*K], and the padding mask, or
    the segments of packed rows.
Out: the context in the same layout and dtype; both are differentiable.
Promise: the maths of `attention.attend` without dropout, to the dtype's precision; the scores
    never reach HBM. Queries that are padding may differ (splash) and must carry no loss.
    Packed rows cost as much as others: no block of scores is left out.

`flash` is made for short rows: all keys of a row lie in VMEM, so softmax is the plain one, with
no running maximum, and the backward pass needs nothing from the forward pass but q, k, v and the
mask. Heads are cut out of blocks of 128 lanes inside the kernel, so HBM sees neither a transpose
nor heads padded from 64 to 128 lanes. What shapes the code, by the compiler's own schedules:

- A product that yields scores contracts over one head alone. Instead of cutting 64 lanes out,
  which costs moves, the other heads' lanes of the one factor are set to zero; the matrix unit
  takes 128 lanes in the time of 64.
- A product that yields [L, K] would fill half of the unit's columns. Its transpose, [K, L], has
  the large matrix as the stationary factor and only K rows to stream, half the passes or fewer.
  This pays where the large matrix stands as the product wants it, that is in the backward pass.
- The stages of neighbouring heads are written interleaved (`_pipelined`): the compiler keeps
  roughly to the order of the program, and this way the matrix unit works on one head while the
  vector unit is at the softmax of another.

Sources: Dao et al. 2022, arXiv:2205.14135, appendix B.4 (backward pass that recomputes the
scores). JAX, jax.experimental.pallas.ops.tpu.splash_attention (splash).

Letters: B batch, L queries, M keys (as many), H heads of size K, R a block of the queries, W lanes
of several heads.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from albert_jax.errors import UserError
from albert_jax.model import attention, layers

LANES = 128
MAX_LENGTH = 1024  # a float32 score matrix of 4 MiB; longer rows want blocks of keys


def unsupported(length: int, num_heads: int, head_size: int) -> str | None:
    """Why the kernels cannot run these shapes, as a message for the user; None where they can.

    Args:
        length: tokens in a row.
        num_heads: heads on one device.
        head_size: lanes of a head.
    """
    instead = "or use model.attention=xla"
    if length % LANES or not 0 < length <= MAX_LENGTH:
        return (
            f"data.max_seq_length={length} does not suit the TPU attention kernels; they want a "
            f"multiple of {LANES} up to {MAX_LENGTH}: choose one, {instead}."
        )
    if head_size not in (32, 64, 128):
        return (
            f"model.hidden_size / model.num_attention_heads = {head_size} does not suit the TPU "
            f"attention kernels; they want heads of size 32, 64 or 128: choose one, {instead}."
        )
    group = LANES // head_size
    if num_heads % group:
        return (
            f"model.num_attention_heads leaves {num_heads} heads on a device, but the TPU "
            f"attention kernels take heads of size {head_size} by {group}: choose a multiple, a "
            f"smaller mesh.tensor, {instead}."
        )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def flash_attention(
    q_BLD: jax.Array,
    k_BMD: jax.Array,
    v_BMD: jax.Array,
    segments_BM: jax.Array,
    num_heads: int,
    interpret: bool = False,
    packed: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(K) + mask) v for every head, in one kernel; its gradient in another.

    Args:
        q_BLD, k_BMD, v_BMD: projections, bfloat16 or float32, D = num_heads * K.
        segments_BM: 1 for a real key, 0 for padding; of packed rows the numbers of segments.
        num_heads: heads in D, those of one device.
        interpret: run on any platform, slowly, by JAX's interpreter.
        packed: a query sees the keys of its own segment alone, and not all real ones.

    Returns:
        context_BLD in q's dtype.

    Raises:
        UserError: shapes the kernel is not made for, see `unsupported`.
    """
    return _forward(q_BLD, k_BMD, v_BMD, segments_BM, num_heads, interpret, packed)


def _flash_fwd(
    q_BLD: jax.Array,
    k_BMD: jax.Array,
    v_BMD: jax.Array,
    segments_BM: jax.Array,
    num_heads: int,
    interpret: bool,
    packed: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    inputs = (q_BLD, k_BMD, v_BMD, segments_BM)
    # The context is no residual: where it is saved anyway, nobody needs to run the kernel again.
    return _forward(*inputs, num_heads, interpret, packed), inputs


def _flash_bwd(
    num_heads: int,
    interpret: bool,
    packed: bool,
    inputs: tuple[jax.Array, ...],
    d_context_BLD: jax.Array,
) -> tuple[jax.Array | None, ...]:
    q_BLD, k_BMD, v_BMD, segments_BM = inputs
    tensors = (q_BLD, k_BMD, v_BMD, d_context_BLD.astype(q_BLD.dtype))
    dq, dk, dv = _call(_backward_kernel, tensors, segments_BM, num_heads, 3, 5, interpret, packed)
    return dq, dk, dv, None


flash_attention.defvjp(_flash_fwd, _flash_bwd)


def _forward(
    q_BLD: jax.Array,
    k_BMD: jax.Array,
    v_BMD: jax.Array,
    segments_BM: jax.Array,
    num_heads: int,
    interpret: bool,
    packed: bool,
) -> jax.Array:
    tensors = (q_BLD, k_BMD, v_BMD)
    return _call(_forward_kernel, tensors, segments_BM, num_heads, 1, 2, interpret, packed)[0]


def _call(
    kernel: Callable[..., None],
    tensors: tuple[jax.Array, ...],
    segments_BM: jax.Array,
    num_heads: int,
    outputs: int,
    products: int,
    interpret: bool,
    packed: bool,
) -> list[jax.Array]:
    """Runs `kernel` over a grid of rows and blocks of heads; `products` per head are L x M x K."""
    batch, length, width = tensors[0].shape
    head_size = width // num_heads
    message = unsupported(length, num_heads, head_size)
    if message:
        raise UserError(message)
    dtype = tensors[0].dtype
    lanes = _lanes(length, width, dtype)
    block = pl.BlockSpec((None, length, lanes), lambda row, heads: (row, 0, heads))
    # Three axes, because a block of one row out of B is none that a chip can cut from [B, M].
    segments = pl.BlockSpec((None, 1, length), lambda row, heads: (row, 0, 0))
    tensor_bytes = batch * length * width * dtype.itemsize
    call: Any = pl.pallas_call(
        functools.partial(kernel, head_size=head_size, packed=packed),
        grid=(batch, width // lanes),
        in_specs=[segments] + [block] * len(tensors),
        out_specs=[block] * outputs,
        out_shape=[jax.ShapeDtypeStruct(tensors[0].shape, dtype)] * outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * batch * length * length * width,
            transcendentals=batch * num_heads * length * length,
            bytes_accessed=(len(tensors) + outputs) * tensor_bytes,
        ),
        interpret=interpret,
        name=f"flash{kernel.__name__.removesuffix('_kernel')}",
    )
    return call(segments_BM[:, None, :], *tensors)


def _lanes(length: int, width: int, dtype: jnp.dtype) -> int:
    """Lanes of a block: 256 hides more of the work at its ends, where VMEM and D allow it."""
    small = length <= 512 and dtype == jnp.bfloat16
    return 2 * LANES if small and width % (2 * LANES) == 0 else LANES


def _forward_kernel(
    segments_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    context_ref: Any,
    *,
    head_size: int,
    packed: bool,
) -> None:
    dtype, bias = q_ref.dtype, _bias(segments_ref, packed)

    def scores(head: int, rows: slice, _: None) -> jax.Array:
        lanes = _group(head, head_size)
        q_RW = _alone(_scaled(q_ref[rows, lanes], head_size), head, head_size)
        return _dot(q_RW, k_ref[:, lanes], 1, 1) + bias(rows)

    def context(head: int, rows: slice, scores_RM: jax.Array) -> tuple[jax.Array, jax.Array]:
        exp_RM, sum_R1 = _softmax_parts(scores_RM)
        group_RW = _dot(exp_RM.astype(dtype), v_ref[:, _group(head, head_size)], 1, 0)
        return group_RW, sum_R1

    done = _pipelined(q_ref, head_size, scores, context)
    for rows, heads in _groups(q_ref, head_size):
        context_RW, sum_RW = done[heads[0], rows.start]
        for head in heads[1:]:
            own = _own_lanes(head, head_size)
            head_RW, sum_R1 = done[head, rows.start]
            context_RW = jnp.where(own, head_RW, context_RW)
            sum_RW = jnp.where(own, sum_R1, sum_RW)
        lanes = _group(heads[0], head_size)
        context_ref[rows, lanes] = (context_RW * (1.0 / sum_RW)).astype(dtype)


def _backward_kernel(
    segments_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_context_ref: Any,
    dq_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    head_size: int,
    packed: bool,
) -> None:
    dtype, bias = q_ref.dtype, _bias(segments_ref, packed)
    q_LW, k_WM = _scaled(q_ref[...], head_size), k_ref[...].T
    q_WL = q_LW.T

    def scores(head: int, rows: slice, _: None) -> jax.Array:
        lanes = _group(head, head_size)
        q_RW = _alone(q_LW[rows, lanes], head, head_size)
        return _dot(q_RW, k_ref[:, lanes], 1, 1) + bias(rows)

    def d_scores(head: int, rows: slice, scores_RM: jax.Array) -> tuple[jax.Array, ...]:
        # The probabilities are exp / sum. The division goes into d_context, which is smaller.
        lanes = _group(head, head_size)
        exp_RM, sum_R1 = _softmax_parts(scores_RM)
        inverse_R1 = 1.0 / sum_R1
        scaled_RW = _alone(d_context_ref[rows, lanes].astype(jnp.float32), head, head_size)
        scaled_RW = (scaled_RW * inverse_R1).astype(dtype)
        d_exp_RM = _dot(scaled_RW, v_ref[:, lanes], 1, 1)
        mean_R1 = inverse_R1 * jnp.sum(exp_RM * d_exp_RM, axis=1, keepdims=True)
        d_scores_RM = exp_RM * (d_exp_RM - mean_R1)
        return exp_RM.astype(dtype), d_scores_RM.astype(dtype), scaled_RW.T

    def gradients(
        head: int, rows: slice, parts: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        exp_RM, d_scores_RM, scaled_WR = parts
        lanes = slice(head * head_size, (head + 1) * head_size)
        in_group = slice(lanes.start % LANES, lanes.start % LANES + head_size)
        dq_KR = _dot(k_WM[lanes], d_scores_RM, 1, 1) * head_size**-0.5
        dk_KM = _dot(q_WL[lanes, rows], d_scores_RM, 1, 0)
        dv_KM = _dot(scaled_WR[in_group], exp_RM, 1, 0)
        return dq_KR, dk_KM, dv_KM

    done = _pipelined(q_ref, head_size, scores, d_scores, gradients)
    totals: dict[int, list[jax.Array]] = {}  # dk_WM and dv_WM of each group
    for rows, heads in _groups(q_ref, head_size):
        parts = zip(*(done[head, rows.start] for head in heads), strict=True)
        dq_WR, *keys_WM = (jnp.concatenate(part, axis=0) for part in parts)
        dq_ref[rows, _group(heads[0], head_size)] = dq_WR.T.astype(dtype)
        if heads[0] in totals:
            keys_WM = [a + b for a, b in zip(totals[heads[0]], keys_WM, strict=True)]
        totals[heads[0]] = keys_WM
    for head, keys_WM in totals.items():
        for ref, gradient_WM in zip((dk_ref, dv_ref), keys_WM, strict=True):
            ref[:, _group(head, head_size)] = gradient_WM.T.astype(dtype)


def _groups(block: Any, head_size: int) -> list[tuple[slice, range]]:
    """(rows, the heads of 128 lanes) for all of a block of queries.

    The rows are cut so that their scores, rounded, take no more than 512 KiB: VMEM, 16 MiB on the
    smallest chip, holds some ten such arrays beside the blocks themselves.
    """
    length, width = block.shape
    divisors = (n for n in range(LANES, length + 1, LANES) if length % n == 0)
    most = max(n for n in divisors if n * length * block.dtype.itemsize <= 2**19)
    heads = LANES // head_size
    return [
        (slice(first_row, first_row + most), range(first_head, first_head + heads))
        for first_row in range(0, length, most)
        for first_head in range(0, width // head_size, heads)
    ]


def _pipelined(
    block: Any, head_size: int, *stages: Callable[[int, slice, Any], Any]
) -> dict[tuple[int, int], Any]:
    """What the last stage makes of each (head, first row); each stage is given the one before's.

    Written so that stage n of one head stands beside stage n-1 of the next.
    """
    items = [(head, rows) for rows, heads in _groups(block, head_size) for head in heads]
    state: list[Any] = [None] * len(items)
    for time in range(len(items) + len(stages) - 1):
        for stage, run in enumerate(stages):
            if 0 <= time - stage < len(items):
                state[time - stage] = run(*items[time - stage], state[time - stage])
    return {(head, rows.start): end for (head, rows), end in zip(items, state, strict=True)}


def _softmax_parts(scores_RM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(exp(scores - their maximum), its sum over M), both in float32."""
    exp_RM = jnp.exp(scores_RM - jnp.max(scores_RM, axis=1, keepdims=True))
    return exp_RM, jnp.sum(exp_RM, axis=1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """The product of two matrices over the given axes, in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=layers.precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _bias(segments_ref: Any, packed: bool) -> Callable[[slice], jax.Array]:
    """What is added to the scores of a block of queries, [R, M], or [1, M] where that is alike for
    all of them.
    """
    segments_1M = segments_ref[...].astype(jnp.float32)
    if not packed:
        bias_1M = (1.0 - segments_1M) * attention.MASKED_SCORE
        return lambda rows: bias_1M
    # A row becomes a column by way of a whole tile, which is what a chip can transpose.
    length = segments_1M.shape[1]
    segments_LW = jnp.broadcast_to(segments_1M, (LANES, length)).T

    def bias(rows: slice) -> jax.Array:
        apart_RM = segments_LW[rows, :1] != segments_1M
        return jnp.where(apart_RM, attention.MASKED_SCORE, 0.0)

    return bias


def _scaled(q_LW: jax.Array, head_size: int) -> jax.Array:
    return (q_LW.astype(jnp.float32) * head_size**-0.5).astype(q_LW.dtype)


def _group(head: int, head_size: int) -> slice:
    """The 128 lanes of a block among which the head's are."""
    start = head * head_size // LANES * LANES
    return slice(start, start + LANES)


def _own_lanes(head: int, head_size: int) -> jax.Array:
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return lane // head_size == head % (LANES // head_size)


def _alone(x_LW: jax.Array, head: int, head_size: int) -> jax.Array:
    """x with the lanes of the group's other heads set to zero."""
    if head_size == LANES:
        return x_LW
    return jnp.where(_own_lanes(head, head_size), x_LW, jnp.zeros_like(x_LW))


def splash_attention(
    q_BLD: jax.Array,
    k_BMD: jax.Array,
    v_BMD: jax.Array,
    segments_BM: jax.Array,
    num_heads: int,
    interpret: bool = False,
    packed: bool = False,
) -> jax.Array:
    """The same by JAX's splash kernel with its fused backward pass.

    Padding is a segment like those of packed rows: real queries see real keys, padded queries see
    padded keys. So a padded position's context differs from `attention.attend`'s, which looks at
    the real keys.

    Args, Returns, Raises: as `flash_attention`.
    """
    batch, length, width = q_BLD.shape
    head_size = width // num_heads
    message = unsupported(length, num_heads, head_size)
    if message:
        raise UserError(message)

    def by_head(x_BLD: jax.Array) -> jax.Array:
        return x_BLD.reshape(batch, length, num_heads, head_size).swapaxes(1, 2)

    block = math.gcd(length, 512)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    full = splash_attention_mask.FullMask((length, length))
    kernel: Any = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([full] * num_heads),
        block_sizes=sizes,
        interpret=interpret,
    )
    del packed  # segments never see each other here
    segments = segments_BM.astype(jnp.int32)
    context_BHLK = jax.vmap(kernel)(
        by_head(_scaled(q_BLD, head_size)),
        by_head(k_BMD),
        by_head(v_BMD),
        splash_attention_kernel.SegmentIds(segments, segments),
    )
    return context_BHLK.swapaxes(1, 2).reshape(q_BLD.shape)
