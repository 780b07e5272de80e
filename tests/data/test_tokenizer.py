"""Ids equal to the released implementation's, the special pieces in their places, vocabularies that
repeat."""

import hashlib
import io
import json
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece

from albert_jax.data import tokenizer
from albert_jax.errors import UserError

PLAIN = tokenizer.Normalization()


def sentences(seed: int, count: int = 400) -> list[str]:
    """Made-up text of many different words, figures among them."""
    rng = random.Random(seed)
    syllables = ["ba", "ker", "lo", "min", "tu", "sel", "po", "rand", "ix", "o", "wen", "gla"]

    def word() -> str:
        kind = rng.random()
        if kind < 0.12:
            return f"{rng.randint(1, 99999):,}"
        if kind < 0.2:
            return f"{rng.randint(1, 2030)},"
        return "".join(rng.choices(syllables, k=rng.randint(1, 4))) + rng.choice(
            ["", "", "", ",", "."]
        )

    return [" ".join(word() for _ in range(rng.randint(2, 23))) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    return tokenizer.train(sentences(1), path, 311, PLAIN)


def slow_ids(processor, text: str) -> list[int]:
    """The rules one after the other, piece by piece, as the released code describes them."""
    text = " ".join(text.strip().split())
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c for c in text if unicodedata.combining(c) == 0).lower()
    pieces = []
    for piece in processor.EncodeAsPieces(text):
        if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
            number = processor.EncodeAsPieces(piece[:-1].replace("\u2581", ""))
            if piece[0] != "\u2581" and number[0][0] == "\u2581":
                number = number[1:] if len(number[0]) == 1 else [number[0][1:], *number[1:]]
            pieces += [*number, ","]
        else:
            pieces.append(piece)
    return [processor.PieceToId(piece) for piece in pieces]


def test_ids_equal_the_released_implementation(shared_data):
    """All of `expected_encodings.jsonl`, lower-cased and not, one by one and in one batch."""
    rows = [
        json.loads(line)
        for line in (shared_data / "tokenizer" / "expected_encodings.jsonl").open(encoding="utf-8")
    ]
    assert len(rows) == 422
    for lower in (True, False):
        options = tokenizer.Normalization(lower_case=lower)
        loaded = tokenizer.Tokenizer.load(shared_data / "tokenizer" / "spiece.model", options)
        wanted = [row for row in rows if row["lower"] == lower]
        ids_T, offsets = loaded.encode_batch([row["text"] for row in wanted])
        for row, start, end in zip(wanted, offsets[:-1], offsets[1:], strict=True):
            assert tokenizer.normalize(row["text"], options) == row["normalized"]
            assert loaded.encode(row["text"]) == row["ids"]
            assert ids_T[start:end].tolist() == row["ids"]
            for piece, token_id in zip(row["pieces"], row["ids"], strict=True):
                assert token_id == loaded.unk_id or loaded.piece(token_id) == piece


def test_the_digit_comma_rule_holds_for_any_vocabulary(model, shared_data):
    for path in (model, shared_data / "tokenizer" / "spiece.model"):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        loaded = tokenizer.Tokenizer.load(path, PLAIN)
        texts = [*sentences(2), "", "3.0,", "1,2,3,", "in 2010, and 2011,", "a,b", ",", "7,"]
        ids_T, offsets = loaded.encode_batch(texts)
        expected = [slow_ids(processor, text) for text in texts]
        assert offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
        assert ids_T.tolist() == [token_id for ids in expected for token_id in ids]
        raw = processor.encode(texts)
        assert raw != expected, "no text here needs the rule"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (tokenizer.Normalization(), "uber cafe 1\u20442 of fi 'naive'"),
        (tokenizer.Normalization(lower_case=False), "Uber Cafe 1\u20442 of fi 'Naive'"),
        (
            tokenizer.Normalization(keep_accents=True),
            "\u00fcber caf\u00e9 1\u20442 of fi 'na\u00efve'",
        ),
        (
            tokenizer.Normalization(lower_case=False, keep_accents=True),
            "\u00dcber Caf\u00e9 1\u20442 of fi 'Na\u00efve'",
        ),
    ],
)
def test_normalisation_options(options, expected):
    text = " \u00dcber\tCafe\u0301 \u00bd\n\nof \ufb01\u00a0'Na\u00efve' "
    assert tokenizer.normalize(text, options) == expected


def test_normalisation_drops_what_unicode_calls_combining_and_nothing_else():
    for code in [*range(0x20, 0x3000, 7), *range(0xA000, 0x11000, 13)]:
        if 0xD800 <= code < 0xE000:
            continue
        text = "a" + chr(code) + "b"
        decomposed = unicodedata.normalize("NFKD", " ".join(text.split()))
        slow = "".join(c for c in decomposed if not unicodedata.combining(c)).lower()
        assert tokenizer.normalize(text, PLAIN) == slow


def test_special_pieces_have_alberts_ids(model):
    loaded = tokenizer.Tokenizer.load(model, PLAIN)
    assert [loaded.piece(i) for i in range(5)] == ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    assert (loaded.pad_id, loaded.unk_id, loaded.cls_id, loaded.sep_id, loaded.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert [loaded.piece(i) for i in range(5, 13)] == list('()"-.\u2013\u00a3\u20ac')
    assert loaded.vocab_size == 311
    assert loaded.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    # Text cannot bring in a control piece.
    assert not set(loaded.encode("<pad> [CLS] [SEP] [MASK] ba")) & {0, 2, 3, 4}
    assert loaded.is_control().nonzero()[0].tolist() == [0, 1, 2, 3, 4]


def test_words_begin_where_the_rule_says(shared_data):
    loaded = tokenizer.Tokenizer.load(shared_data / "tokenizer" / "spiece.model", PLAIN)
    starts_V = loaded.word_starts()
    pieces = [loaded.piece(i) for i in range(loaded.vocab_size)]
    for piece, starts in {
        "\u2581the": True,
        "ing": False,
        "s": False,
        ",": True,
        ".": True,
        "<unk>": True,
        "2000": True,
        "'": True,
    }.items():
        assert starts_V[pieces.index(piece)] == starts, piece
    for piece, starts in zip(pieces, starts_V, strict=True):
        only_letters = all(letter in "abcdefghijklmnopqrstuvwxyz" for letter in piece)
        assert starts == (not only_letters), piece


def test_decoding_gives_the_normalised_text_back(model):
    loaded = tokenizer.Tokenizer.load(model, PLAIN)
    text = "balo minker, tusel. 4 ixpo"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.decode([loaded.cls_id, *loaded.encode(text), loaded.sep_id]) == text


def test_training_repeats_byte_for_byte_in_another_process(model, tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_tokenizer as t;"
        "t.tokenizer.train(iter(t.sentences(1)), sys.argv[1], 311, t.PLAIN)"
    )
    folder = __file__.rpartition("/")[0]
    subprocess.run([sys.executable, "-c", script, tmp_path / "again.model", folder], check=True)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


def test_training_reads_no_more_than_it_is_told_and_passes_on_what_its_source_raises(tmp_path):
    read = []

    def source():
        for text in sentences(3):
            read.append(text)
            yield text

    tokenizer.train(source(), tmp_path / "some.model", 99, PLAIN, max_texts=57)
    # One more is asked for to see that there is one.
    assert len(read) in (57, 58)

    def broken():
        yield from sentences(3, 5)
        raise UserError("x.txt, line 6: no text")

    with pytest.raises(UserError, match="line 6: no text"):
        tokenizer.train(broken(), tmp_path / "none.model", 99, PLAIN)
    assert not (tmp_path / "none.model").exists()


def test_training_says_which_sizes_are_possible(tmp_path):
    texts = sentences(4, 60)
    with pytest.raises(UserError, match="largest it can fill is") as caught:
        tokenizer.train(texts, tmp_path / "x.model", 5000, PLAIN)
    largest = int(str(caught.value).split("can fill is ")[1].split(".")[0])
    tokenizer.train(texts, tmp_path / "x.model", largest, PLAIN)
    with pytest.raises(UserError, match="too small") as caught:
        tokenizer.train(texts, tmp_path / "y.model", 30, PLAIN)
    least = int(str(caught.value).split("alone are ")[1].rstrip("."))
    tokenizer.train(texts, tmp_path / "y.model", least, PLAIN)
    with pytest.raises(UserError, match="no text"):
        tokenizer.train(["", "  "], tmp_path / "z.model", 100, PLAIN)


def test_a_file_that_is_no_tokenizer_is_refused_by_what_is_wrong_with_it(tmp_path):
    bare = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences(5)), model_writer=bare, vocab_size=71, minloglevel=3
    )
    for content, message in (
        (None, "cannot be read"),
        (b"", "not a SentencePiece model"),
        (b"garbage" * 99, "not a SentencePiece model"),
        (bare.getvalue(), r"no <pad> \[CLS\] \[SEP\] \[MASK\]"),
    ):
        path = tmp_path / "x.model"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            tokenizer.Tokenizer.load(path, PLAIN)
