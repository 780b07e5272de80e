"""Whatever the text: no character is lost on the way into a store, no token on the way out of it,
nothing is empty and nothing fails."""

import collections
import contextlib
import io
import pathlib
import random
import re
import tempfile
import unicodedata

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from albert_jax import prepare
from albert_jax.data import examples, store, tokenizer
from albert_jax.errors import UserError
from tests.data import slow_examples as slow

SPECIAL = 5
OBJECTIVES = ("sop", "nsp", "none")


def lines_of_all_scripts() -> dict[str, str]:
    """A line of made-up words for every script that Unicode has letters of."""
    letters = collections.defaultdict(list)
    for code in range(0x250000):
        if code < 0x110000 and unicodedata.category(chr(code)) in ("Ll", "Lo", "Mn", "Mc", "Nd"):
            name = unicodedata.name(chr(code), "")
            letters[" ".join(name.split()[: 2 if name.startswith(("OLD", "CJK")) else 1])].append(
                code
            )
    rng = random.Random(0)
    lines = {}
    for script, codes in letters.items():
        words = [
            "".join(chr(rng.choice(codes)) for _ in range(rng.randint(2, 7))) for _ in range(9)
        ]
        lines[script] = " ".join(words) + rng.choice(
            [".", "!", "?", "\u3002", "\u0964", "\u061f", ""]
        )
    return lines


SCRIPTS = lines_of_all_scripts()

words = st.sampled_from(
    ["one", "Two", "3,000", "p.m.", "\u00e9t\u00e9", "\u6d77", "x" * 50, "\u200b", "-"]
)
sentences = st.one_of(
    st.lists(words, min_size=1, max_size=40).map(lambda found: " ".join(found) + "."),
    st.sampled_from(sorted(SCRIPTS.values())),
    # Everything but what is refused as no text, and what ends a line.
    st.text(
        st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"),
        max_size=60,
    ),
    st.sampled_from(["a", ".", "\u0301\u0301", "word", "\u00ad", "?!", "\ufeff", "Ab. " * 300]),
)
paragraphs = st.lists(sentences, min_size=1, max_size=4).map(" ".join)
documents = st.lists(paragraphs, min_size=1, max_size=5)
corpora = st.lists(documents, min_size=1, max_size=8)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer that knows every byte, so that its ids can be read back."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return tokenizer.train(
        ["one two three four."] * 9, path, 270, tokenizer.Normalization(), kind="bpe"
    )


def prepared(
    text: bytes, model: pathlib.Path, folder: pathlib.Path, *flags: str
) -> store.Store | None:
    """The store of a text; None where there is nothing in it to train on."""
    (folder / "text.txt").write_bytes(text)
    command = [f"--input={folder}/text.txt", f"--output={folder}/store", f"--tokenizer={model}"]
    refused = None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            prepare.main([*command, "--workers=1", "--validation_fraction=0.3", *flags])
        except UserError as error:
            refused = str(error)
    if refused:
        assert re.search("nothing to train on|the input is empty", refused)
        return None
    return store.open_store(folder / "store")


def visible(text: str) -> collections.Counter[str]:
    return collections.Counter("".join(text.split()))


def split_of(shards) -> slow.Split:
    """A split as lists, for the slow version."""
    return [
        [
            [
                shard.tokens[a:b].tolist()
                for a, b in zip(
                    *(shard.sentences[i : j + 1][k:][: j - i] for k in (0, 1)), strict=True
                )
            ]
            for i, j in zip(shard.documents[:-1], shard.documents[1:], strict=True)
        ]
        for shard in shards
    ]


def check_examples(shards, known: tokenizer.Tokenizer, length: int) -> None:
    """Every token is in one chunk of an epoch, and no example is empty."""
    split = split_of(shards)
    assert all(document and all(document) for shard in split for document in shard)
    tokens = np.concatenate([shard.tokens for shard in shards])
    vocabulary = examples.Vocabulary.of(known)
    for objective in OBJECTIVES:
        chosen = examples.ExampleOptions(
            max_seq_length=length,
            max_predictions_per_seq=5,
            masked_lm_prob=0.15,
            ngram=3,
            short_seq_prob=0.1,
            seed=3,
            sentence_objective=objective,
            single_sentence="split",
            # A word of many bytes may be larger than a short row's whole budget of masks.
            whole_word_masking=False,
        )
        if objective == "nsp" and sum(map(len, split)) < 2:
            continue
        builder = examples.ExampleBuilder(shards, vocabulary, chosen)
        chunks = slow.chunks(split, chosen)
        assert len(chunks) == builder.examples_per_epoch
        in_chunks = [slow.joined(chunk.sentences) for chunk in chunks]
        assert all(in_chunks)
        np.testing.assert_array_equal(np.concatenate(in_chunks), tokens)
        batch = builder.batch(0, len(chunks))
        assert (batch["attention_mask"].sum(1) > 2).all()
        assert batch["masked_lm_weights"].any(1).all()
        if objective == "none":
            ids_BL = batch["input_ids"].copy()
            rows, slots = np.nonzero(batch["masked_lm_weights"])
            ids_BL[rows, batch["masked_lm_positions"][rows, slots]] = batch["masked_lm_ids"][
                rows, slots
            ]
            shown = ids_BL[batch["attention_mask"] > 0]
            count = np.bincount(shown, minlength=known.vocab_size)
            count[[known.cls_id, known.sep_id]] = 0
            np.testing.assert_array_equal(count, np.bincount(tokens, minlength=known.vocab_size))
        else:
            wanted = slow.rows(split, vocabulary, chosen, range(min(len(chunks), 5)))
            for name, array in builder.batch(0, len(wanted)).items():
                np.testing.assert_array_equal(array, np.array([row[name] for row in wanted]))


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
    corpus=corpora,
    length=st.integers(8, 70),
    language=st.sampled_from(["en", "de", "hi", "zh", "ja", "th", "ar", "my", "ur", "am", "el"]),
)
def test_no_character_and_no_token_is_lost(byte_level, corpus, length, language):
    text = "\n\n".join("\n".join(document) for document in corpus)
    with tempfile.TemporaryDirectory() as folder:
        made = prepared(text.encode(), byte_level, pathlib.Path(folder), f"--language={language}")
        if made is None:
            return
        known = made.tokenizer()
        shards = [shard for split in store.SPLITS for shard in made.split(split)]
        read = sum((visible(known.decode(shard.tokens)) for shard in shards), visible(""))
        lost = visible(text) - read
        assert not read - visible(text)
        # A document of one word is left out, and counted.
        single = made.manifest["skipped"].get("documents of one word", {"count": 0})["count"]
        assert lost.total() <= 30 * single
        for split in store.SPLITS:
            if made.manifest["splits"][split]["tokens"]:
                check_examples(made.split(split), known, length)


def test_the_scripts_of_all_languages(byte_level, tmp_path):
    assert len(SCRIPTS) > 150  # all that Unicode has
    text = "\n\n".join(SCRIPTS.values())
    made = prepared(text.encode(), byte_level, tmp_path)
    known = made.tokenizer()
    shards = [shard for split in store.SPLITS for shard in made.split(split)]
    read = sum((visible(known.decode(shard.tokens)) for shard in shards), visible(""))
    assert read == visible(text)
    check_examples(made.split("train"), known, 40)


def test_a_sentence_of_100_000_tokens_among_sentences_of_one(byte_level, tmp_path):
    rng = random.Random(1)
    giant = " ".join(rng.choices(["one", "two", "three", "four", "five"], k=60_000))
    # And one without a single place to cut it.
    text = f"One.\n\nA. B. C.\n\n{giant}\n\nYes. {'x' * 100_000}"
    made = prepared(text.encode(), byte_level, tmp_path, "--document=file")
    known = made.tokenizer()
    shards = [shard for split in store.SPLITS for shard in made.split(split)]
    assert sum(len(shard.tokens) for shard in shards) > 200_000
    assert sum((visible(known.decode(shard.tokens)) for shard in shards), visible("")) == visible(
        text
    )
    for split in store.SPLITS:
        if made.manifest["splits"][split]["tokens"]:
            check_examples(made.split(split), known, 16)


@pytest.mark.parametrize("content", [b"\x01\x02\x07\n\n\x08\x1b", b"\n\n \t\n", b"\xe2\x80\x8b\n"])
def test_text_of_nothing_to_see_is_no_store(content, byte_level, tmp_path):
    assert prepared(content, byte_level, tmp_path, "--errors=skip") is None
    assert not (tmp_path / "store").exists()
