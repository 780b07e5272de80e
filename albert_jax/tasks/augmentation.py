"""Changed copies of training rows, made of synonyms, paraphrases and a model's proposals.

In:  rows of one text or several.
Out: copies with the number of the row they are of, whose label they keep.

Promise: a copy is a pure function of (row, its number, its copy's number, options, files); of a
model's proposals up to rounding on the device.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from albert_jax.config import AugmentationConfig
from albert_jax.data import augmentation
from albert_jax.training import run_folder

if TYPE_CHECKING:
    from albert_jax.tasks import paraphrase

Segments = tuple[str, ...]


class _Wanted(NamedTuple):
    row: int
    copy: int
    segments: Segments


_Source = Callable[[Sequence[_Wanted]], list[Segments]]


def is_asked(options: AugmentationConfig) -> bool:
    """Whether a source of changes is given."""
    return bool(options.synonyms or options.paraphrases or options.model)


def augment_texts(
    texts: Sequence[Segments], options: AugmentationConfig
) -> list[tuple[int, Segments]]:
    """(row, changed segments) of up to `options.copies` copies of each row, in the order of rows.

    The sources that are given take turns over rows and copies; where one changes nothing, the next
    is asked. Copies that are like their row, or like one before, are left out.

    Args:
        texts: of each row its segments; each of them is changed.
        options: what to change them with.

    Raises:
        UserError: a file or model that cannot be read.
    """
    sources = _sources(options)
    pending = [
        _Wanted(row, copy, segments)
        for row, segments in enumerate(texts)
        for copy in range(options.copies)
    ]
    found: dict[tuple[int, int], Segments] = {}
    for turn in range(len(sources)):
        for place, source in enumerate(sources):
            mine = [one for one in pending if (one.row + one.copy + turn) % len(sources) == place]
            for one, changed in zip(mine, source(mine), strict=True):
                if changed != one.segments:
                    found[one.row, one.copy] = changed
        pending = [one for one in pending if (one.row, one.copy) not in found]
    unlike = dict.fromkeys((row, changed) for (row, _), changed in sorted(found.items()))
    return list(unlike)


def _sources(options: AugmentationConfig) -> list[_Source]:
    sources: list[_Source] = []
    if options.synonyms:
        lexicon = augmentation.read_lexicon(run_folder.fetched(options.synonyms))
        sources.append(functools.partial(_with_synonyms, lexicon, options))
    if options.paraphrases:
        pairs = augmentation.read_paraphrases(run_folder.fetched(options.paraphrases))
        sources.append(functools.partial(_with_paraphrases, pairs, options))
    if options.model:
        from albert_jax.tasks import paraphrase  # and JAX, which the others need not

        model = paraphrase.load(run_folder.fetched(options.model))
        sources.append(functools.partial(_with_model, model, options))
    return sources


def _with_synonyms(
    lexicon: augmentation.Lexicon, options: AugmentationConfig, wanted: Sequence[_Wanted]
) -> list[Segments]:
    return [
        tuple(
            augmentation.replaced(text, lexicon, options.rate, _draw(options, one, number))
            for number, text in enumerate(one.segments)
        )
        for one in wanted
    ]


def _with_paraphrases(
    pairs: Mapping[str, tuple[str, ...]], options: AugmentationConfig, wanted: Sequence[_Wanted]
) -> list[Segments]:
    def changed(one: _Wanted, number: int, text: str) -> str:
        others = pairs.get(augmentation.plain(text))
        return others[_draw(options, one, number).integers(len(others))] if others else text

    return [
        tuple(changed(one, number, text) for number, text in enumerate(one.segments))
        for one in wanted
    ]


def _with_model(
    model: "paraphrase.Proposals", options: AugmentationConfig, wanted: Sequence[_Wanted]
) -> list[Segments]:
    texts = [text for one in wanted for text in one.segments]
    draws = [_draw(options, one, number) for one in wanted for number in range(len(one.segments))]
    changed = iter(model.replaced(texts, options.rate, draws))
    return [tuple(next(changed) for _ in one.segments) for one in wanted]


def _draw(options: AugmentationConfig, one: _Wanted, number: int) -> np.random.Generator:
    return augmentation.generator(options.seed, one.row, one.copy, number)
