"""Synonyms and paraphrases: how many words change, which never do, and that a seed decides."""

import gzip
import itertools

import numpy as np
import pytest

from albert_jax import config
from albert_jax.data import augmentation as lib
from albert_jax.data.tokenizer import Normalization, Tokenizer
from albert_jax.errors import UserError
from albert_jax.tasks import augmentation, classification, metrics

SMALL = lib.Lexicon(
    {
        "large": ("big", "huge", "enormous"),
        "story": ("tale", "narrative"),
        "happy": ("glad",),
        "Haus": ("Gebäude",),
    }
)


def _all(text, lexicon=SMALL, seed=0):
    """With every word that can be."""
    return lib.replaced(text, lexicon, 0.9999, lib.generator(seed, 0, 0))


@pytest.fixture(scope="module")
def wordnet(shared_data):
    return lib.read_lexicon(shared_data / "synonyms")


def test_the_rate_is_met_over_many_words():
    lexicon = lib.Lexicon({f"w{c}": (f"n{c}",) for c in "abcdefgh"})
    words = np.random.default_rng(0)
    for rate in (0.05, 0.1, 0.5):
        changed = count = 0
        for row in range(600):
            text = " ".join(f"w{'abcdefghijklmnop'[i]}" for i in words.integers(0, 16, 11))
            new = lib.replaced(text, lexicon, rate, lib.generator(0, row, 0))
            changed += sum(a != b for a, b in zip(text.split(), new.split(), strict=True))
            count += 11
        # At one half every word with a synonym is replaced in most texts, and some have too few.
        assert changed / count == pytest.approx(rate, abs=0.01 if rate < 0.5 else 0.08)


def test_a_seed_decides_and_rows_copies_and_segments_differ():
    text = "a large story , happy large story and happy large stories " * 4
    keys = list(itertools.product(range(2), repeat=4))
    found = [lib.replaced(text, SMALL, 0.3, lib.generator(*key)) for key in keys]
    again = [lib.replaced(text, SMALL, 0.3, lib.generator(*key)) for key in keys]
    assert found == again
    assert len(set(found)) == len(keys)


def test_capitals_stay():
    assert _all("Happy. Happy! \u201cHappy\u201d") == "Glad. Glad! \u201cGlad\u201d"
    # In mid-sentence a capital is a name's; more of them an abbreviation's.
    assert _all("I saw Happy HAPPY hApPy happy") == "I saw Happy HAPPY hApPy glad"
    # As written in the lexicon it may stand anywhere.
    assert _all("Das Haus , haus") == "Das Gebäude , haus"


def test_digits_brackets_and_what_is_between_words_stay():
    text = "[happy] happy2 3-happy 1.happy [MASK happy] \thappy,\n happy-happy  "
    assert _all(text) == "[happy] happy2 3-happy 1.happy [MASK happy] \tglad,\n glad-glad  "
    assert _all("unhappy happy's happyé") == "unhappy happy's happyé"
    assert _all("") == ""


def test_an_article_fits_the_word_behind_it():
    found = {_all("a large", seed=seed) for seed in range(20)}
    assert found == {"a big", "a huge"}
    found = {_all("extra large", seed=seed) for seed in range(20)}
    assert found == {"extra big", "extra huge", "extra enormous"}


def test_wordnet_gives_single_plain_words_of_the_first_sense(wordnet):
    assert len(wordnet.synonyms) == 25_063
    assert wordnet.synonyms["movie"] == ("film", "pic")
    assert wordnet.synonyms["often"] == ("frequently", "oftentimes", "oft", "ofttimes")
    # Of grammar; of another sense; an inflected form.
    for word in ("may", "are", "but", "years", "watching", "men", "a", "in"):
        assert word not in wordnet.synonyms
    for word, others in wordnet.synonyms.items():
        assert others
        assert word not in others
        assert all(one.isalpha() and one.islower() for one in others)


def test_a_tsv_is_a_lexicon(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("\ufefflarge\tbig| huge |large\n\nlarge\tvast\nred wine\tclaret\n", "utf-8")
    assert lib.read_lexicon(path).synonyms == {
        "large": ("big", "huge", "vast"),
        "red wine": ("claret",),
    }


def test_broken_files_are_refused_by_line(tmp_path):
    path = tmp_path / "words.tsv"
    for content, said in (
        (b"", "holds no word with a synonym"),
        (b"\n\n", "holds no word with a synonym"),
        (b"a\tb\nlarge big\n", "line 2: 'large big' is not a word"),
        (b"large\t\n", "line 1: 'large' is not a word"),
        (b"large\tlarge\n", "line 1: 'large' has no synonym but itself"),
        (b"caf\xe9\tbar\n", "not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            lib.read_lexicon(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="holds no pair"):
        lib.read_paraphrases(path)
    with pytest.raises(UserError, match="cannot be read"):
        lib.read_lexicon(tmp_path / "none.tsv")
    with pytest.raises(UserError, match="a WordNet folder holds"):
        lib.read_lexicon(tmp_path)
    (tmp_path / "synsets.tsv.gz").write_bytes(gzip.compress(b"a\tb\n"))
    with pytest.raises(UserError, match="line 1: the columns"):
        lib.read_lexicon(tmp_path)


def test_copies_name_their_rows_and_are_like_none_before(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text(
        "often\toft|frequently|commonly\nstory\ttale|narrative\nmovie\tfilm\nfunny\tdroll\n"
        "big\tlarge\nlittle\tsmall|tiny\n"
    )
    rows = [
        ("an often told story about a movie", "a happy and a funny world"),
        ("xyzzy", "plugh"),
        ("a big house", "a little house"),
    ]
    options = config.AugmentationConfig(synonyms=str(path), rate=0.3, copies=5, seed=3)
    found = augmentation.augment_texts(rows, options)
    assert found == augmentation.augment_texts(rows, options)
    other = config.AugmentationConfig(synonyms=options.synonyms, rate=0.3, copies=5, seed=4)
    assert found != augmentation.augment_texts(rows, other)
    assert [row for row, _ in found] == sorted(row for row, _ in found)
    assert {row for row, _ in found} == {0, 2}
    assert len(set(found)) == len(found) <= 10
    assert all(segments != rows[row] and len(segments) == 2 for row, segments in found)
    # A row is changed as it is among others, whatever they are.
    alone = augmentation.augment_texts([rows[0], ("", ""), ("", "")], options)
    assert alone == [one for one in found if one[0] == 0]


def test_sources_take_turns_and_help_each_other_out(tmp_path):
    (tmp_path / "words.tsv").write_text("large\tbig\nsmall\tlittle\n")
    (tmp_path / "texts.tsv").write_text("one large  house\ta villa\nhello\tgood day\nhello\thi\n")
    options = config.AugmentationConfig(
        synonyms=str(tmp_path / "words.tsv"),
        paraphrases=str(tmp_path / "texts.tsv"),
        rate=0.9,
        copies=2,
    )
    rows = [("one large house",), ("hello",), ("small small small",), ("none",)]
    found = augmentation.augment_texts(rows, options)
    assert {segments for row, segments in found if row == 0} == {("one big house",), ("a villa",)}
    assert {segments[0] for row, segments in found if row == 1} <= {"good day", "hi"}
    assert any(row == 1 for row, _ in found)
    assert any(row == 2 for row, _ in found)
    assert not any(row == 3 for row, _ in found)
    assert augmentation.augment_texts(rows, config.AugmentationConfig()) == []
    assert not augmentation.is_asked(config.AugmentationConfig())
    assert augmentation.is_asked(options)


@pytest.mark.parametrize("paired", [False, True])
def test_training_rows_keep_their_labels(shared_data, tmp_path, paired):
    (tmp_path / "words.tsv").write_text("large\tbig\nstory\ttale|narrative\n")
    spoken = Tokenizer.load(shared_data / "tokenizer" / "spiece.model", Normalization())
    kind = classification.Kind("classification", ("no", "yes"), metrics.accuracy)
    texts = ["a story", "nothing here", "no story", "the large story"]
    rows = [
        classification.Example(str(n), text, "a large one" if paired else None, n % 2)
        for n, text in enumerate(texts)
    ]
    options = config.AugmentationConfig(synonyms=str(tmp_path / "words.tsv"), rate=0.9)
    made = classification.augmented(rows, options)
    assert {one.key for one in made} == ({"0", "1", "2", "3"} if paired else {"0", "2", "3"})
    assert all(one.label == int(one.key) % 2 for one in made)
    assert all((one.second is not None) == paired for one in made)
    features, _ = classification.featurise(rows, kind, spoken, 32, options)
    plain, _ = classification.featurise([*rows, *made], kind, spoken, 32)
    assert features.ids.tolist() == plain.ids.tolist()
    labels = features.targets["labels"].tolist()
    assert labels == [0, 1, 0, 1, *(one.label for one in made)]
    same, _ = classification.featurise(rows, kind, spoken, 32, config.AugmentationConfig())
    assert len(same) == 4
    with pytest.raises(UserError, match="none of 1 rows is changed by synonyms="):
        classification.augmented(
            rows[1:2] if not paired else [rows[1]._replace(second="")], options
        )
