"""Ids of every family equal to those of `transformers` on ten thousand lines, vocabularies that
repeat, stores and runs that keep any of them, and masks in text."""

import json
import pathlib
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import transformers

from albert_jax import prepare
from albert_jax.data import examples, huggingface_tokenizer, store, tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import fill_mask
from albert_jax.training import workdir as workdir_lib

UNCASED = tokenizer.Normalization()
CASED = tokenizer.Normalization(lower_case=False)
LIKE_TRANSFORMERS = tokenizer.Normalization(compatible_with="huggingface")
# Fragments of lines full of what tokenizers disagree on.
FRAGMENTS = (
    r"""
3.0, 1,234,567.89 2010, 12, 0,5 1.000,00 1st £5 €6 % x=1 5' 3" (a) [b] {c} "q" ``x'' don't U.S.A.
e.g. … -- — A\u2013B a_b #tag @me http://a.b/c?d=e &amp; < > ##ing Ġ ▁ | é ñandú Ünïcödé a\u0301 ß ẞ
Œuvre q\u0323\u0307 ½ ﬁ ① Ⅷ \uff21\uff22\uff23 İstanbul Σίσυφος ΟΔΟΣ Привіт हिन्दी ไทย العربية 日本語
中文字符 한국어 😀 👩\u200d👩\u200d👧 🇫🇷 \u200b \ufeff \u00ad
""".encode("ascii", "backslashreplace")
    .decode("unicode_escape")
    .split()
)
FRAGMENTS += ["\u00a0", "\u3000", "  ", "\t", "\x1c", "\u0301", " ", "''", "'s"]


def documents(shared_data: pathlib.Path, folder: str) -> list[str]:
    return [
        path.read_text(encoding="utf-8")
        for path in sorted((shared_data / "corpus" / folder).glob("*"))
    ]


@pytest.fixture(scope="module")
def texts(shared_data):
    """10,900 lines: novels in four languages, an encyclopedia, and made ones."""
    rng = random.Random(1)
    found = []
    for folder, count in (
        ("en_novels", 3000),
        ("de_eltec", 2500),
        ("fr_eltec", 2500),
        ("uk_eltec", 400),
        ("en_wikitext2", 1000),
    ):
        lines = [
            line
            for document in documents(shared_data, folder)
            for line in map(str.strip, document.splitlines())
            if line
        ]
        found += [line[:200] for line in rng.sample(lines, count)]
    for _ in range(1500):
        pieces = rng.choices(FRAGMENTS, k=rng.randint(1, 12))
        found.append("".join(piece + rng.choice([" ", " ", ""]) for piece in pieces))
    assert len(found) == 10_900
    return found


@pytest.fixture(scope="module")
def trained(shared_data, tmp_path_factory):
    """Folders with a vocabulary each, of 4,000 pieces, made of three novels."""
    folder = tmp_path_factory.mktemp("vocabularies")
    novels = documents(shared_data, "en_novels")[:3]
    sentences = [line for novel in novels for line in novel.splitlines()]
    for name, kind, options in (
        ("bert", "wordpiece", UNCASED),
        ("bert-cased", "wordpiece", CASED),
        ("roberta", "bpe", UNCASED),
    ):
        (folder / name).mkdir()
        path = folder / name / tokenizer.TRAINED_FILES[kind]
        tokenizer.train(iter(sentences), path, 4000, options, kind=kind)
    (folder / "albert").mkdir()
    model = (shared_data / "tokenizer" / "spiece.model").read_bytes()
    (folder / "albert" / "spiece.model").write_bytes(model)
    return folder


def load(trained, name):
    """Ours, and that of transformers, from the same file."""
    if name == "albert":
        path, options = trained / name / "spiece.model", LIKE_TRANSFORMERS
        theirs = transformers.AlbertTokenizer.from_pretrained(trained / name)
    elif name == "roberta":
        path, options = trained / name / "tokenizer.json", UNCASED
        theirs = transformers.RobertaTokenizer.from_pretrained(trained / name)
    else:
        path, options = trained / name / "vocab.txt", CASED if name.endswith("cased") else UNCASED
        theirs = transformers.BertTokenizer.from_pretrained(
            trained / name, do_lower_case=options.lower_case
        )
    return tokenizer.Tokenizer.load(path, options), theirs


def differing(ours, theirs, texts):
    """The texts whose ids differ."""
    ids_T, offsets = ours.encode_batch(texts)
    wanted = theirs(texts, add_special_tokens=False)["input_ids"]
    return [
        text
        for text, start, end, ids in zip(texts, offsets, offsets[1:], wanted, strict=False)
        if ids_T[start:end].tolist() != ids
    ]


@pytest.mark.parametrize("name", ["albert", "bert", "bert-cased", "roberta"])
def test_ids_equal_those_of_transformers(name, trained, texts):
    ours, theirs = load(trained, name)
    assert differing(ours, theirs, texts) == []
    for text in texts[:3]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.vocab_size == len(theirs)
    for special in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(ours, f"{special}_id") == getattr(theirs, f"{special}_token_id")
    assert ours.mask_token == theirs.mask_token
    unknown = np.mean(ours.encode_batch(texts)[0] == ours.unk_id)
    assert unknown < 0.1, "too little is known for equal ids to mean much"


@pytest.mark.parametrize("lower_case", [True, False])
@pytest.mark.parametrize("keep_accents", [True, False])
def test_options_mean_what_they_mean_in_transformers(lower_case, keep_accents, trained, texts):
    chosen = [*texts[4000:4300], *texts[-300:]]
    ours = tokenizer.Tokenizer.load(
        trained / "albert" / "spiece.model",
        tokenizer.Normalization(lower_case, keep_accents, "huggingface"),
    )
    theirs = transformers.AlbertTokenizer.from_pretrained(
        trained / "albert", do_lower_case=lower_case, keep_accents=keep_accents
    )
    assert differing(ours, theirs, chosen) == []
    ours = tokenizer.Tokenizer.load(
        trained / "bert" / "vocab.txt", tokenizer.Normalization(lower_case, keep_accents)
    )
    theirs = transformers.BertTokenizer.from_pretrained(
        trained / "bert",
        do_lower_case=lower_case,
        strip_accents=False if keep_accents else None,
    )
    assert differing(ours, theirs, chosen) == []
    assert ours.normalization.keep_accents == (keep_accents or not lower_case)


def test_alberts_usual_ids_differ_from_those_of_transformers_only_where_it_is_said(trained, texts):
    usual = tokenizer.Tokenizer.load(trained / "albert" / "spiece.model", UNCASED)
    theirs = load(trained, "albert")[1]
    triggers = re.compile(r"\d,|``|''|[()\"\-.\u2013\u00a3\u20ac]")
    plain = [text for text in texts if not triggers.search(text)]
    assert len(plain) > 2000
    assert differing(usual, theirs, plain) == []
    for text, google, huggingface in (
        ("in 2010, and", "▁in ▁2010 , ▁and", "▁in ▁2010, ▁and"),
        ("U.S. is", "▁u . s . ▁is", "▁u . ▁ s . ▁is"),
        ("a (b)", "▁a ▁ ( b )", "▁a ( ▁b )"),
        ("``one'' text", "▁ <unk> one ' ' ▁text", '▁ " one " ▁text'),
    ):
        assert [usual.piece(i) for i in usual.encode(text)] == google.split()
        assert theirs.tokenize(text) == huggingface.split()
    assert differing(usual, theirs, texts), "the option changes nothing"


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_tokenizer_json_gives_the_ids_of_transformers_that_wrote_it(
    name, trained, texts, tmp_path
):
    theirs = load(trained, name)[1]
    theirs.save_pretrained(tmp_path)
    ours = tokenizer.Tokenizer.load(tmp_path / "tokenizer.json", UNCASED)
    assert differing(ours, theirs, texts[::9]) == []
    assert ours.family == name
    assert ours.normalization.lower_case == (name == "bert")
    # What such a file says of padding, cutting and dropout is for others.
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst"}
    content["truncation"]["stride"] = 0
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0}
    content["padding"] |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "[PAD]"}
    if name == "roberta":
        content["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = tokenizer.Tokenizer.load(tmp_path / "tokenizer.json", UNCASED)
    assert differing(ours, theirs, texts[::99]) == []


@pytest.mark.parametrize("name", ["albert", "albert-google", "bert-cased", "roberta"])
def test_what_is_exported_gives_our_ids_in_transformers(name, trained, texts, tmp_path):
    ours = (
        tokenizer.Tokenizer.load(trained / "albert" / "spiece.model", UNCASED)
        if name == "albert-google"
        else load(trained, name)[0]
    )
    for file, content in huggingface_tokenizer.export(ours, segments=True, max_length=64).items():
        (tmp_path / file).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    # Segmentations of equal score may be told apart otherwise: one in ten thousand lines.
    assert len(differing(ours, theirs, texts[::2])) <= (2 if name == "albert-google" else 0)
    first, second = "A first one, of 2010,", "and another."
    pair = [ours.cls_id, *ours.encode(first), ours.sep_id]
    pair += [ours.sep_id] * (name == "roberta") + [*ours.encode(second), ours.sep_id]
    assert theirs(first, second)["input_ids"] == pair
    assert theirs.pad_token_id == ours.pad_id
    text = f"It is {ours.mask_token}, and {ours.mask_token} too."
    if name != "albert-google":  # whose text behind a mask without a space begins no word
        assert theirs(text)["input_ids"] == fill_mask.encode(ours, text, 99)


def test_a_mask_is_one_piece_wherever_it_stands(trained):
    for name, text, wanted in (
        ("bert", "The [MASK]s of [MASK]. [MASK]", "the [MASK] s of [MASK] . [MASK]"),
        ("roberta", "The <mask>s of <mask>. <mask>", "The <mask> s Ġof <mask> . <mask>"),
        ("roberta", "[MASK] of the [MASK].", "<mask> Ġof Ġthe <mask> ."),
    ):
        ours, theirs = load(trained, name)
        ids = fill_mask.encode(ours, text, 99)
        assert [ours.piece(i) for i in ids[1:-1]] == wanted.split()
        assert ids == theirs(text.replace("[MASK]", ours.mask_token))["input_ids"]
    ours = tokenizer.Tokenizer.load(trained / "albert" / "spiece.model", UNCASED)
    ids = fill_mask.encode(ours, "The [MASK]s of [MASK]. [MASK] is", 99)
    wanted = "▁the [MASK] s ▁of [MASK] . [MASK] ▁is"
    assert [ours.piece(i) for i in ids[1:-1] if ours.piece(i) != "▁"] == wanted.split()
    with pytest.raises(UserError, match=re.escape("no [MASK]")):
        fill_mask.encode(ours, "nothing to guess", 99)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_repeats_byte_for_byte_in_another_process(kind, shared_data, tmp_path):
    script = (
        "import pathlib, sys; from albert_jax.data import tokenizer as t;"
        "texts = pathlib.Path(sys.argv[1]).read_text(encoding='utf-8').splitlines();"
        "t.train(texts, sys.argv[2], 1000, t.Normalization(), kind=sys.argv[3])"
    )
    # With rare characters, for which there is no room.
    novel = shared_data / "corpus" / "fr_eltec" / "FRA02901_Noailles.txt"
    text = novel.read_text(encoding="utf-8")[:300_000] + " ".join(FRAGMENTS) * 2
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    made = []
    for number, threads in enumerate(("false", "true", "true")):
        path = tmp_path / f"{number}-{tokenizer.TRAINED_FILES[kind]}"
        subprocess.run(
            [sys.executable, "-c", script, tmp_path / "text.txt", path, kind],
            env={"TOKENIZERS_PARALLELISM": threads, "PATH": ""},
            cwd=pathlib.Path(__file__).parents[2],
            check=True,
        )
        made.append(path.read_bytes())
    assert made[0] == made[1] == made[2]
    assert tokenizer.Tokenizer.load(path, UNCASED).vocab_size == 1000


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_says_which_sizes_are_possible(kind, tmp_path):
    texts = [f"{word} and {word}s again" for word in ("river", "stone", "cloud", "mellow")] * 9
    path = tmp_path / tokenizer.TRAINED_FILES[kind]

    def train(size, given=texts):
        return tokenizer.train(given, path, size, UNCASED, kind=kind)

    with pytest.raises(UserError, match="largest it can fill is") as caught:
        train(5000)
    largest = int(str(caught.value).split("can fill is ")[1].split(".")[0])
    assert tokenizer.Tokenizer.load(train(largest), UNCASED).vocab_size == largest
    with pytest.raises(UserError, match="too small") as caught:
        train(20)
    least = int(str(caught.value).split("alone are ")[1].rstrip("."))
    assert tokenizer.Tokenizer.load(train(least), UNCASED).vocab_size == least
    with pytest.raises(UserError, match="no text"):
        train(1000, ["", "  "])

    def broken():
        yield from texts
        raise UserError("x.txt, line 6: no text")

    path.unlink()
    with pytest.raises(UserError, match="line 6: no text"):
        train(1000, broken())
    assert not path.exists()


def test_text_cannot_bring_in_a_control_piece(trained):
    text = "[MASK] <mask> a [SEP] </s> <s> [CLS] [PAD] <pad> [UNK] <unk>"
    for name in ("albert", "bert-cased", "roberta"):
        ours = load(trained, name)[0]
        found = set(ours.encode(text)) - {ours.unk_id}
        assert len(found) > 5
        assert not found & set(np.flatnonzero(ours.is_control()).tolist())
        assert ours.decode([ours.cls_id, *ours.encode("a river"), ours.sep_id]) == "a river"
        if name == "roberta":
            assert ours.decode(ours.encode(text)) == text


def test_words_begin_where_each_kind_says(trained):
    for name, wanted in (
        ("bert", "*a *river *, *so *z ##y ##x *."),
        ("roberta", "A *Ġriver , *Ġso *Ġ z y x ."),
    ):
        ours = load(trained, name)[0]
        starts_V = ours.word_starts()
        ids = ours.encode("A river, so zyx.")
        assert ["*" * bool(starts_V[i]) + ours.piece(i) for i in ids] == wanted.split()
        assert examples.Vocabulary.of(ours).pad_id == ours.pad_id == (name == "roberta")


def test_a_piece_reads_as_people_write_it(trained):
    roberta, bert = load(trained, "roberta")[0], load(trained, "bert")[0]
    for ours, text in ((roberta, " the"), (bert, "the"), (load(trained, "albert")[0], "the")):
        assert [ours.readable(i) for i in ours.encode(text)] == ["the"]
    assert roberta.readable(roberta.mask_id) == "<mask>"
    assert roberta.decode(roberta.encode("Élan 日本 😀, so.")) == "Élan 日本 😀, so."


SENTENCES = ["The river rose.", "Nobody counted it!", "(It went on: 2010, 2011.)", "Then it fell."]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_store_and_a_run_keep_their_tokenizer(kind, shared_data, tmp_path):
    """Prepared from text by the command, and the ids of a document are those of its text."""
    rng = random.Random(3)
    text = "\n\n".join(" ".join(rng.choices(SENTENCES, k=9)) for _ in range(80))
    (tmp_path / "text.txt").write_text(text)
    common = [f"--input={tmp_path / 'text.txt'}", "--validation_fraction=0.2", "--workers=1"]
    prepare.main(
        [
            *common,
            f"--output={tmp_path / 'store'}",
            f"--train_tokenizer={kind}",
            f"--vocab_size={dict(wordpiece=70, bpe=300)[kind]}",
        ]
    )
    made = store.open_store(tmp_path / "store")
    name = tokenizer.TRAINED_FILES[kind]
    assert {path.name for path in made.path.iterdir()} == {name, *store.SPLITS, "manifest.json"}
    assert made.manifest["tokenizer"]["file"] == name
    theirs = transformers.AutoTokenizer.from_pretrained(
        made.path,
        config=transformers.RobertaConfig() if kind == "bpe" else transformers.BertConfig(),
    )
    written = [
        theirs(document, add_special_tokens=False)["input_ids"] for document in text.split("\n\n")
    ]
    stored = [
        shard.tokens[shard.sentences[begin] : shard.sentences[end]].tolist()
        for split in store.SPLITS
        for shard in made.split(split)
        for begin, end in zip(shard.documents, shard.documents[1:], strict=False)
    ]
    assert sorted(stored) == sorted(written)
    # The same vocabulary, given as a file, makes the same store.
    prepare.main(
        [*common, f"--output={tmp_path / 'again'}", f"--tokenizer={tmp_path / 'store' / name}"]
    )
    assert store.open_store(tmp_path / "again").fingerprint == made.fingerprint
    workdir = tmp_path / "run"
    workdir.mkdir()
    workdir_lib.write_tokenizer(made.tokenizer(), workdir)
    kept = workdir_lib.load_tokenizer(workdir)
    assert kept.sha256 == made.tokenizer().sha256
    assert kept.normalization == made.tokenizer().normalization
    assert kept.encode(SENTENCES[2]) == made.tokenizer().encode(SENTENCES[2])
    (workdir / name).unlink()
    with pytest.raises(UserError, match=r"vocab\.txt"):
        workdir_lib.load_tokenizer(workdir)


def test_a_store_says_whose_ids_it_has(shared_data, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(SENTENCES[i:]) for i in range(3)))
    stores = {}
    for whose in tokenizer.COMPATIBLE_WITH:
        prepare.main(
            [
                f"--input={tmp_path / 'text.txt'}",
                f"--output={tmp_path / whose}",
                f"--tokenizer={shared_data / 'tokenizer' / 'spiece.model'}",
                f"--compatible_with={whose}",
                "--workers=1",
            ]
        )
        stores[whose] = store.open_store(tmp_path / whose)
        assert stores[whose].tokenizer().normalization.compatible_with == whose
    assert stores["google"].fingerprint != stores["huggingface"].fingerprint
    # As it was before there was a choice, so that older stores and runs go on.
    assert stores["google"].manifest["normalization"] == {"lower_case": True, "keep_accents": False}
    assert set(stores["google"].manifest["tokenizer"]) == {"sha256", "vocab_size"}


def test_a_manifest_cannot_name_a_file_elsewhere(shared_data, tmp_path):
    manifest = {"format_version": 1, "tokenizer": {"file": "../secret"}, "token_dtype": "uint16"}
    store.write_manifest(tmp_path, manifest)
    with pytest.raises(UserError, match=r"names the tokenizer '\.\./secret'"):
        store.open_store(tmp_path)


def test_a_file_that_is_no_tokenizer_is_refused_by_what_is_wrong_with_it(trained, tmp_path):
    roberta = json.loads((trained / "roberta" / "tokenizer.json").read_text())
    characters = json.dumps(roberta | {"pre_tokenizer": {"type": "Whitespace"}})
    words = {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}
    for name, content, message in (
        ("vocab.txt", b"[PAD]\n[UNK]\nthe\n", r"no \[CLS\] \[SEP\] \[MASK\] among its 3 pieces"),
        ("vocab.txt", b"\xff\xfe\n", "no UTF-8 text"),
        ("vocab.txt", b"", r"no \[PAD\]"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff", "not a tokenizer.json"),
        ("tokenizer.json", characters.replace("<mask>", "<gap>").encode(), "a BPE of another kind"),
        (
            "tokenizer.json",
            json.dumps(roberta).replace("<mask>", "<gap>").encode(),
            "no <mask> among",
        ),
        ("tokenizer.json", json.dumps(roberta | {"model": words}).encode(), "WordLevel of another"),
        ("spiece.model", b"nothing", "not a SentencePiece model"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            tokenizer.Tokenizer.load(path, UNCASED)
    with pytest.raises(UserError, match="for SentencePiece models"):
        tokenizer.Tokenizer.load(trained / "bert" / "vocab.txt", LIKE_TRANSFORMERS)
