"""Documents, paragraphs and sentences out of files: every layout, every cut, every kind of bad
byte."""

import gzip
import json
import random
import textwrap

import pytest

from albert_jax.data import sources, text
from albert_jax.errors import UserError

# Written for these tests: what wrapping makes hard. Names in mid-sentence, abbreviations, dashes,
# quoted speech, numbers, a question, a paragraph of one sentence.
PARAGRAPHS = [
    "The old ferry left the island every morning at seven, whatever the weather was, and it "
    "came back "
    "at noon with the post, the bread and whoever had business on our side. Nobody could "
    "remember a "
    "year in which it had stayed away. My grandfather said that Captain Brandt had once steered "
    "it home "
    "with a broken arm.",
    '"You will want the blue rope," he said, "and not the green one; the green one is for '
    'Sundays."',
    "I never found out what he meant by that. There were three ropes in the shed, as far as I "
    "could see, "
    "and all of them were brown. Was he joking? Perhaps he was. On 3 March, however, a parcel "
    "arrived "
    "from Mr. Olsen in Bergen with two coils of the finest blue rope I have ever held.",
    "It was heavier than it looked. We carried it down to the pier between us, my sister "
    "walking in "
    "front with the lantern, and hung it on the hook by the door, where it stays to this day!",
    "Years later, when the bridge had been built and the ferry sold to a museum in Rotterdam, "
    "people "
    "would stop me in the street and ask about the rope. I told them that I knew nothing. Every "
    "summer "
    "somebody offered money for it; every summer I said that it was not mine to sell.",
]
SENTENCES = [
    [
        "The old ferry left the island every morning at seven, whatever the weather was, and it "
        "came "
        "back at noon with the post, the bread and whoever had business on our side.",
        "Nobody could remember a year in which it had stayed away.",
        "My grandfather said that Captain Brandt had once steered it home with a broken arm.",
    ],
    [PARAGRAPHS[1]],
    [
        "I never found out what he meant by that.",
        "There were three ropes in the shed, as far as I could see, and all of them were brown.",
        "Was he joking?",
        "Perhaps he was.",
        "On 3 March, however, a parcel arrived from Mr. Olsen in Bergen with two coils of the "
        "finest "
        "blue rope I have ever held.",
    ],
    [
        "It was heavier than it looked.",
        "We carried it down to the pier between us, my sister walking in front with the "
        "lantern, and "
        "hung it on the hook by the door, where it stays to this day!",
    ],
    [
        "Years later, when the bridge had been built and the ferry sold to a museum in Rotterdam, "
        "people would stop me in the street and ask about the rope.",
        "I told them that I knew nothing.",
        "Every summer somebody offered money for it; every summer I said that it was not mine "
        "to sell.",
    ],
]
ALL_SENTENCES = [sentence for paragraph in SENTENCES for sentence in paragraph]


def read(path, largest=1 << 30, file_format="", **reading):
    """Documents of a file as lists of sentences, read unit by unit; and what was skipped."""
    how = sources.Reading(**reading)
    skipped = sources.Skipped()
    told = []
    units = sources.units(str(path), file_format, how, largest)
    documents = [
        [found for paragraph in document for found in text.sentences(paragraph, how.language)]
        for unit in units
        for document in sources.documents(unit, how, skipped, told.append)
    ]
    # A progress bar that ends at 100 %, whatever was found.
    assert sum(told) == path.stat().st_size
    return documents, skipped


def wrap(width: int) -> list[list[str]]:
    return [textwrap.wrap(paragraph, width, break_on_hyphens=False) for paragraph in PARAGRAPHS]


@pytest.mark.parametrize("width", [0, *range(45, 131, 5)])
@pytest.mark.parametrize("between", ["", "\n"])
def test_every_layout_gives_the_same_sentences(width, between, tmp_path):
    lines = wrap(width) if width else [[paragraph] for paragraph in PARAGRAPHS]
    written = f"\n{between}".join("\n".join(paragraph) for paragraph in lines) + "\n"
    for name, content in (
        ("plain", written.encode()),
        ("windows", b"\xef\xbb\xbf" + written.replace("\n", "\r\n").encode()),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        (document,), skipped = read(path, document="file")
        assert document == ALL_SENTENCES
        assert not skipped


def test_lines_of_uneven_length_are_joined_where_they_stop_in_mid_sentence():
    rng = random.Random(1)
    lines = []
    for paragraph in PARAGRAPHS * 4:
        words = paragraph.split()
        while words:
            line = [words.pop(0)]
            while words and len(" ".join(line)) < 70 and rng.random() < 0.93:
                line.append(words.pop(0))
            lines.append(" ".join(line))
        lines.append("")
    found = [
        each for paragraph in text.paragraphs(lines) for each in text.sentences(paragraph, "en")
    ]
    # Before a name no line says whether it goes on; small letters always do.
    assert not any(sentence[0].islower() for sentence in found)
    assert sum(sentence in ALL_SENTENCES for sentence in found) > 0.75 * len(found)


def test_one_sentence_a_line_stays_one_sentence_a_line():
    for lines in (
        ALL_SENTENCES,
        ["A short one.", "Another short one.", "The third is a little longer than that."],
        ["the cat sat on the mat", "a dog lay by the door", "no one had come home yet"],
        ["First heading", "Second heading", "Third heading", "Fourth heading"],
        [sentence.lower().rstrip(".!?") for sentence in ALL_SENTENCES if len(sentence) < 140],
    ):
        assert text.paragraphs(lines) == lines


def test_headings_and_verse_in_wrapped_text_stay_apart():
    lines = [
        *textwrap.wrap(PARAGRAPHS[0], 70),
        "CHAPTER II",
        "The wind goes up,",
        "The wind goes down,",
    ]
    lines += ["And no one knows", *textwrap.wrap(PARAGRAPHS[2], 70)]
    assert text.paragraphs(lines) == [
        PARAGRAPHS[0],
        "CHAPTER II",
        "The wind goes up,",
        "The wind goes down,",
        "And no one knows",
        *["".join(PARAGRAPHS[2])],
    ]


def test_a_hyphen_at_the_end_of_a_wrapped_line_joins_its_word_and_a_dash_keeps_its_space():
    lines = [
        "The keeper of the light was a tall young colour-",
        "sergeant of the coast guard who had a wooden leg -",
        "it had been made in Lisbon, so people said - and he",
        "walked as if the ground were always moving a little.",
    ]
    (joined,) = text.paragraphs(lines)
    assert "colour-sergeant" in joined
    assert "leg - it had" in joined


def test_wrapped_text_without_spaces_between_words_is_joined_without_any():
    sentence = (
        "\u6d77\u5cb8\u7684\u706f\u5854\u6bcf\u5929\u665a\u4e0a\u90fd\u4eae\u7740" * 20 + "\u3002"
    )
    lines = textwrap.wrap(sentence, 40)
    assert len(lines) > 3
    assert text.paragraphs(lines, "zh") == [sentence]


def test_the_sentences_of_a_novel_survive_wrapping(shared_data, tmp_path):
    """A novel with a paragraph a line, wrapped by the standard library at several widths."""
    novel = shared_data / "corpus" / "en_novels" / "Braddon_Audley_1862.txt"
    (original,), _ = read(novel, document="file")
    lines = novel.read_text(encoding="utf-8-sig").split("\n")
    # Without blank lines nobody can tell a paragraph's full last line from any other.
    for width, between, least in ((60, "\n\n", 1.0), (72, "\n", 0.985), (95, "\n", 0.985)):
        wrapped = between.join(
            "\n".join(textwrap.wrap(line, width, break_on_hyphens=False))
            for line in lines
            if line.strip()
        )
        path = tmp_path / f"{width}.txt"
        path.write_text(wrapped)
        (document,), _ = read(path, document="file")
        kept = set(document)
        assert sum(sentence in kept for sentence in original) >= least * len(original)


def test_a_blank_line_parts_documents_or_paragraphs_as_it_is_told(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("\n \nOne is here. Two.\nThree.\n\t\n\nFour.\n\n\n")
    assert read(path)[0] == [["One is here.", "Two.", "Three."], ["Four."]]
    assert read(path, document="file")[0] == [["One is here.", "Two.", "Three.", "Four."]]


@pytest.mark.parametrize("seed", range(6))
def test_the_units_of_a_file_hold_each_document_once(seed, tmp_path):
    rng = random.Random(seed)
    pieces = []
    for index in range(60):
        lines = [
            f"Number {index} says {'so ' * rng.randint(1, 30)}here."
            for _ in range(rng.randint(1, 4))
        ]
        pieces.append("\n".join(lines) + "\n" * rng.randint(2, 4))
    ending = rng.choice(["\n", "\r\n"])
    plain, packed, lines = tmp_path / "x.txt", tmp_path / "x.txt.gz", tmp_path / "x.jsonl"
    written = "".join(pieces).replace("\n", ending).encode()
    plain.write_bytes(written)
    packed.write_bytes(gzip.compress(written))
    lines.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    whole, _ = read(plain)
    assert len(whole) == 60
    assert read(packed, largest=50)[0] == whole
    for largest in (1, 7, 64, 333, rng.randint(100, 3000)):
        assert read(plain, largest)[0] == whole
        assert read(lines, largest)[0] == whole


def test_a_blank_line_is_found_far_behind_the_end_of_a_unit(tmp_path):
    """Wherever it lies to the blocks in which the search for it reads."""
    path = tmp_path / "x.txt"
    step, block = 1 << 16, 1 << 20
    for shift in range(-3, 4):
        first = b"Word. " * ((step + block) // 6)
        first = first[: step - 1 + block - 1 + shift]
        path.write_bytes(first + b"\n \nThe second. It ends.\n\nThe third. It ends.\n")
        whole, _ = read(path)
        assert len(whole) == 3
        assert read(path, step)[0] == whole


def test_a_json_document_is_parted_into_paragraphs_and_unwrapped_like_a_file(tmp_path):
    path = tmp_path / "x.jsonl"
    body = "\n\n".join("\n".join(paragraph) for paragraph in wrap(64))
    path.write_text(json.dumps({"id": 1, "body": body}) + "\n")
    assert read(path, text_field="body")[0] == [ALL_SENTENCES]


def test_a_document_over_the_limit_comes_in_parts_without_loss(tmp_path):
    path = tmp_path / "x.txt"
    lines = [
        f"This is line {index} of a very long document, which goes on" + "." * (index % 7 == 0)
        for index in range(350_000)
    ]
    path.write_text("\n".join(lines))
    how, skipped = sources.Reading(document="file"), sources.Skipped()
    (unit,) = sources.units(str(path), "", how, 1 << 20)
    parts = list(sources.documents(unit, how, skipped, lambda size: None))
    assert " ".join(paragraph for part in parts for paragraph in part) == " ".join(lines)
    assert all(part[-1].endswith(".") for part in parts[:-1])
    assert len(parts) > 2
    assert all(sum(map(len, part)) < 1.2 * sources.DOCUMENT_LIMIT for part in parts)
    assert [count for count, _ in skipped.values()] == [len(parts) - 1]


def test_a_sentence_without_an_end_is_cut_at_white_space_without_loss():
    words = [f"word{index}" for index in range(9000)]
    found = text.sentences(" ".join(words), "en")
    assert len(found) > 2
    assert max(map(len, found)) <= text.SENTENCE_LIMIT
    assert " ".join(found).split() == words
    unbroken = "x" * 50_001
    assert "".join(text.sentences(unbroken, "en")) == unbroken


@pytest.mark.parametrize("seed", range(5))
def test_a_bad_line_is_named_by_line_and_byte_or_left_out_alone(seed, tmp_path):
    rng = random.Random(seed)
    lines = [f"This is line number {index}, and it is fine.".encode() for index in range(3000)]
    bad = rng.randrange(len(lines))
    byte = rng.choice([b"\xff", b"\xc3(", b"\x00", b"\x1b", b"\x7f", b"\xed\xa0\x80"])
    place = rng.randrange(len(lines[bad]))
    good = lines[bad]
    lines[bad] = good[:place] + byte + good[place:]
    path = tmp_path / "x.txt"
    path.write_bytes(b"\n".join(lines))
    offset = sum(len(line) + 1 for line in lines[:bad]) + place
    for target in (path, tmp_path / "x.txt.gz"):
        if target != path:
            target.write_bytes(gzip.compress(path.read_bytes()))
        with pytest.raises(UserError) as caught:
            read(target)
        assert f"{target}, line {bad + 1} (byte {offset})" in str(caught.value)
        (document,), skipped = read(target, skip_errors=True)
        assert [count for count, _ in skipped.values()] == [1]
        del lines[bad + 1 :], lines[bad:]
        lines += [
            f"This is line number {index}, and it is fine.".encode()
            for index in range(bad + 1, 3000)
        ]
        assert document == [line.decode() for line in lines]
        lines.insert(bad, good)


def test_only_the_overlong_line_is_left_out(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"Before it is fine.\n" + b"a b " * (5 << 20) + b"\nAfter it is fine.\n")
    with pytest.raises(UserError, match=r"line 2 \(byte 19\): a line of over 16 MiB"):
        read(path)
    for largest in (1 << 30, 1 << 20):
        documents, skipped = read(path, largest, skip_errors=True)
        assert [found for document in documents for found in document] == [
            "Before it is fine.",
            "After it is fine.",
        ]
        assert len(skipped) == 1


def test_files_are_found_by_pattern_sorted_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert sources.find(["b.txt", "*.txt"]) == ["b.txt", "a.txt", "odd[1].txt"]
    assert sources.find(["**/*.txt"]) == ["a.txt", "b.txt", "deep/er/c.txt", "odd[1].txt"]
    assert sources.find(["odd[1].txt"]) == ["odd[1].txt"]
    for pattern, message in (("*.md", "names no file"), ("deep", "is a folder")):
        with pytest.raises(UserError, match=message):
            sources.find([pattern])
