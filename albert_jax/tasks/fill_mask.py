"""Fill-mask: text with [MASK] or <mask> in it to the most probable pieces for each.

Letters: B texts, L sequence length, P masked slots, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from albert_jax.data.tokenizer import Tokenizer
from albert_jax.errors import UserError
from albert_jax.training import program

MASK = "[MASK]"  # however the tokenizer writes it

Guess = tuple[str, float]


def encode(tokenizer: Tokenizer, text: str, longest: int) -> list[int]:
    """The text between begin and end as ids, every mask as its id.

    Raises:
        UserError: no mask, or more than `longest` pieces.
    """
    first, *others = text.replace(MASK, tokenizer.mask_token).split(tokenizer.mask_token)
    if not others:
        raise UserError(f"no {MASK} in {text!r}; put one where a word is to be guessed.")
    ids = [tokenizer.cls_id, *tokenizer.encode(_before_mask(tokenizer, first))]
    for part in others[:-1]:
        part = _before_mask(tokenizer, part)
        ids += [tokenizer.mask_id, *tokenizer.encode_after_mask(part)]
    ids += [tokenizer.mask_id, *tokenizer.encode_after_mask(others[-1])]
    ids.append(tokenizer.sep_id)
    if len(ids) > longest:
        raise UserError(
            f"{text[:60]!r}... has {len(ids)} pieces; this model reads {longest} at most "
            "(data.max_seq_length)."
        )
    return ids


def fill(
    run: program.Program,
    params: Any,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[int]],
    top_k: int,
) -> list[list[list[Guess]]]:
    """For each text, for each of its masks, the `top_k` most probable pieces, best first.

    Args:
        run, params: a pretrained model (`training.inference.load`).
        tokenizer: turns ids into pieces.
        texts: what `encode` made.
        top_k: how many guesses a mask.
    """
    rows, length = run.config.train.global_batch_size, run.config.data.max_seq_length
    top_k = min(top_k, tokenizer.vocab_size)
    masks = [np.flatnonzero(np.asarray(ids) == tokenizer.mask_id) for ids in texts]
    slots = max((len(where) for where in masks), default=1)

    @jax.jit
    def best(params: Any, ids_BL: jax.Array, mask_BL: jax.Array, slots_BP: jax.Array) -> Any:
        output: Any = run.model.apply(
            {"params": params}, ids_BL, jnp.zeros_like(ids_BL), mask_BL, slots_BP
        )
        return jax.lax.top_k(jax.nn.softmax(output.masked_lm_logits_BPV), top_k)

    answers = []
    for start in range(0, len(texts), rows):
        ids_BL = np.full((rows, length), tokenizer.pad_id, np.int32)
        mask_BL, slots_BP = np.zeros_like(ids_BL), np.zeros((rows, slots), np.int32)
        part = range(start, min(start + rows, len(texts)))
        for row, number in enumerate(part):
            ids_BL[row, : len(texts[number])] = texts[number]
            mask_BL[row, : len(texts[number])] = 1
            slots_BP[row, : len(masks[number])] = masks[number]
        shares_BPK, ids_BPK = jax.device_get(best(params, ids_BL, mask_BL, slots_BP))
        for row, number in enumerate(part):
            answers.append(
                [
                    [
                        (tokenizer.readable(token), float(share))
                        for token, share in zip(
                            ids_BPK[row, slot], shares_BPK[row, slot], strict=True
                        )
                    ]
                    for slot in range(len(masks[number]))
                ]
            )
    return answers


def _before_mask(tokenizer: Tokenizer, part: str) -> str:
    """The text before a mask, without the space that the mask stands for."""
    return part.rstrip() if tokenizer.mask_takes_space else part
