"""Sentences, case, accents and words of languages that are not English."""

import random
import textwrap

import pytest

from albert_jax import prepare
from albert_jax.data import text, tokenizer
from albert_jax.errors import UserError

# Three sentences each, written for these tests; what is hard about a language is in them.
SENTENCES = {
    "en": ["Dr. Smith arrived at 3 p.m. on Monday.", "Was he late?", "No!"],
    "de": ["Wir treffen uns z. B. am 3. Oktober bei Dr. Maier.", "Das kostet ca. 20 Euro.", "Ja?"],
    "fr": ["Il est arrivé hier soir.", "Il a dit : « Bonjour ! »", "Pourquoi donc ?"],
    "es": ["El Sr. García llegó ayer.", "¿Dónde estaba?", "¡Qué sorpresa!"],
    "it": ["Il dott. Rossi è arrivato ieri.", "Dove era?", "Non lo so."],
    "pt": ["O Sr. Silva chegou ontem.", "Onde ele estava?", "Ninguém sabe."],
    "nl": ["De heer J. de Vries kwam gisteren.", "Waar was hij?", "Niemand weet het."],
    "sv": ["Han kom hem i går kväll.", "Var hade han varit?", "Ingen vet."],
    "pl": ["Przyszedł wczoraj wieczorem.", "Gdzie on był?", "Nikt tego nie wie."],
    "cs": ["Přišel včera večer.", "Kde byl?", "Nikdo to neví."],
    "ru": ["Он пришёл вчера вечером.", "Где он был?", "Никто не знает."],
    "uk": ["Він прийшов учора ввечері.", "Де він був?", "Ніхто не знає."],
    "el": ["Ήρθε χθες το βράδυ.", "Πού ήταν;", "Κανείς δεν ξέρει."],
    "tr": ["Dün akşam eve geldi.", "Neredeydi?", "Kimse bilmiyor."],
    "fi": ["Hän tuli eilen illalla kotiin.", "Missä hän oli?", "Kukaan ei tiedä."],
    "hu": ["Tegnap este jött haza.", "Hol volt?", "Senki sem tudja."],
    "vi": ["Anh ấy về nhà tối qua.", "Anh ấy đã ở đâu?", "Không ai biết."],
    "id": ["Dia pulang tadi malam.", "Di mana dia berada?", "Tidak ada yang tahu."],
    "sw": ["Alirudi nyumbani jana usiku.", "Alikuwa wapi?", "Hakuna anayejua."],
    "ar": ["عاد إلى البيت مساء أمس.", "أين كان؟", "لا أحد يعرف."],
    "fa": ["او دیشب به خانه آمد.", "کجا بود؟", "هیچ‌کس نمی‌داند."],
    "ur": ["وہ کل رات گھر آیا۔", "وہ کہاں تھا؟", "کوئی نہیں جانتا۔"],
    "he": ["הוא חזר הביתה אתמול בערב.", "איפה הוא היה?", "אף אחד לא יודע."],
    "hi": ["वह कल रात घर आया।", "वह कहाँ था?", "कोई नहीं जानता।"],
    "bn": ["সে গতকাল রাতে বাড়ি এসেছে।", "সে কোথায় ছিল?", "কেউ জানে না।"],
    "ta": ["அவர் நேற்று இரவு வீட்டுக்கு வந்தார்.", "அவர் எங்கே இருந்தார்?", "யாருக்கும் தெரியாது."],
    "zh": ["他昨天晚上回家了。", "他去哪儿了？", "没有人知道！"],
    "ja": ["彼は昨夜家に帰った。", "どこにいたのか？", "誰も知らない。"],
    "ko": ["그는 어젯밤 집에 왔다.", "어디에 있었을까?", "아무도 모른다."],
    "hy": ["Նա երեկ երեկոյան տուն եկավ։", "Որտե՞ղ էր նա։", "Ոչ ոք չգիտի։"],
    "am": ["ትናንት ማታ ወደ ቤት መጣ።", "የት ነበር?", "ማንም አያውቅም።"],
    "my": ["သူ မနေ့ညက အိမ်ပြန်လာတယ်။", "သူ ဘယ်မှာ ရှိခဲ့သလဲ။", "ဘယ်သူမှ မသိဘူး။"],
    "ka": ["ის გუშინ საღამოს მოვიდა.", "სად იყო?", "არავინ იცის."],
}  # fmt: skip
UNSPACED = {"zh", "ja"}


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_end_where_the_language_ends_them(language):
    space = "" if language in UNSPACED else " "
    paragraph = space.join(SENTENCES[language])
    assert text.sentences(paragraph, language) == SENTENCES[language]


# In Burmese a space parts phrases, and whether there was one at the end of a line is not known.
@pytest.mark.parametrize("language", sorted(set(SENTENCES) - {"my"}))
def test_wrapped_lines_are_joined_in_every_language(language):
    space = "" if language in UNSPACED else " "
    # One long sentence of all words, twice: most lines stop in mid-sentence.
    words = "".join(c for c in space.join(SENTENCES[language] * 4) if c.isalpha() or c in " \u200c")
    paragraph = space.join([" ".join(words.split()) + SENTENCES[language][0][-1]] * 2)
    lines = [line for _ in range(4) for line in [*textwrap.wrap(paragraph, 47), ""]]
    assert text.paragraphs(lines, language) == [paragraph] * 4


def test_the_last_line_of_a_wrapped_paragraph_is_known_by_its_stop_in_every_script():
    for language, sentences in SENTENCES.items():
        for sentence in sentences:
            # In Greek the sign of a question is the semicolon of others; in French a quote has
            # spaces inside.
            assert text.SENTENCE_END.search(sentence) or sentence.endswith((";", " »")), language


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u0915\u092e", "\u0915\u094d\u092e"),  # Hindi: with and without virama
        ("\u0e44\u0e21\u0e49", "\u0e44\u0e21\u0e48"),  # Thai: wood and not, a tone apart
        ("m\u00e1", "m\u00e0"),  # Vietnamese
        ("\u304b\u304d", "\u304c\u304d"),  # Japanese: oyster and child, voiced
        ("schon", "sch\u00f6n"),
        ("\u05e1\u05b5\u05e4\u05b6\u05e8", "\u05e1\u05b7\u05e4\u05b8\u05bc\u05e8"),  # Hebrew
    ],
)
def test_marks_that_tell_words_apart_are_kept_if_told_to(one, other):
    for keep_accents in (False, True):
        options = tokenizer.Normalization(keep_accents=keep_accents)
        same = tokenizer.normalize(one, options) == tokenizer.normalize(other, options)
        assert same != keep_accents


@pytest.mark.parametrize(
    ("flags", "notes"),
    [
        ("--language=en", []),
        ("--language=zh", []),
        ("--language=hi", ["marks that are letters"]),
        ("--language=hi --keep_accents", []),
        ("--language=fr", ["accents, which tell words"]),
        ("--language=tr --keep_accents", ["and not \u0131"]),
        ("--language=tr --keep_accents --cased", []),
        ("--language=de-CH --cased", ["accents, which"]),
        ("--language=de --cased --train_tokenizer=wordpiece", []),
        ("--language=hi --train_tokenizer=bpe", []),
    ],
)
def test_what_normalisation_would_do_to_a_language_is_said_first(flags, notes):
    chosen = flags.split()
    if "--train_tokenizer" not in flags:
        chosen.append("--train_tokenizer")
    said = prepare._language_notes(prepare._flags(["--input=x", "--output=y", *chosen]))
    assert len(said) == len(notes)
    assert all(part in note for part, note in zip(notes, said, strict=True))


def test_what_a_word_is_in_chinese_and_japanese(tmp_path):
    """The rules that `Tokenizer.word_starts` states, on vocabularies made of the text."""
    rng = random.Random(0)
    chinese = ["".join(rng.sample([*SENTENCES["zh"], "昨天没有人回家。"], 3)) for _ in range(99)]
    chinese[0] = "".join(SENTENCES["zh"])
    japanese = ["".join(SENTENCES["ja"])] * 30
    options = tokenizer.Normalization(keep_accents=True)

    def words(kind: str, texts: list[str]) -> list[str]:
        path = tmp_path / tokenizer.TRAINED_FILES[kind]
        path.unlink(missing_ok=True)
        with pytest.raises(UserError, match="the largest it can fill is") as caught:
            tokenizer.train(texts, path, 9999, options, kind=kind)
        largest = int(str(caught.value).partition("can fill is ")[2].partition(".")[0])
        tokenizer.train(texts, path, largest, options, kind=kind)
        known = tokenizer.Tokenizer.load(path, options)
        ids = known.encode(texts[0])
        assert known.unk_id not in ids
        starts_V = known.word_starts()
        found: list[list[int]] = []
        for token_id in ids:
            if starts_V[token_id] or not found:
                found.append([])
            found[-1].append(token_id)
        return [known.decode(word).replace(" ", "") for word in found]

    # ALBERT: as many words as pieces, some of more than one character.
    by_pieces = words("unigram", chinese)
    assert "".join(by_pieces) == tokenizer.normalize(chinese[0], options)
    assert max(map(len, by_pieces)) > 1
    # BERT: an ideograph a word; kana stay together.
    assert words("wordpiece", chinese)[:3] == ["他", "昨", "天"]
    assert "どこにいたのか" in words("wordpiece", japanese)
    # RoBERTa: what stands between spaces, here all of it.
    assert len(words("bpe", chinese)) == 1
