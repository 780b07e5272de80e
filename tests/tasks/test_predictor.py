"""Answers from text against PyTorch Transformers with the same folder: pipelines where it has one,
else its logits, states and attentions with plain searches and sums over them. And the command,
which prints them.

The models are small and random, one of each family and head; so are their vocabularies.
"""

import functools
import html
import itertools
import json
import os
import pathlib
import re
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import small_store
import torch
import transformers

import albert_jax
from albert_jax import convert
from albert_jax.data import tokenizer
from albert_jax.errors import UserError
from albert_jax.interop import models
from albert_jax.tasks.predictor import Predictor

LONGEST = 40  # pieces that the models read
CLASSES = {
    "albert": "Albert",
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
}
SIZES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "bert": {},
    "roberta": {"max_position_embeddings": LONGEST + 2, "type_vocab_size": 1},
    "distilbert": {"dim": 24, "hidden_dim": 40, "n_heads": 3, "n_layers": 2},
}
USUAL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": LONGEST,
}
KINDS = {"albert": "unigram", "bert": "wordpiece", "roberta": "bpe", "distilbert": "wordpiece"}
VOCABULARY = {"unigram": 60, "wordpiece": 90, "bpe": 320}
pytestmark = pytest.mark.usefixtures("compiles_fast")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
WORD = re.compile(r"\w+|[^\w\s]")

TEXTS = [
    "The cat sees the dog.",
    "Rain",
    "The sailor remembers the horse near the bridge.",
    "The doctor likes the house.",
]
PAIRS = ["The dog forgets.", "The cat, by the sea.", "A", "Sea"]
LONG = " ".join(small_store.sentences(1, 9))

Folder = Callable[..., pathlib.Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Makes the folder of a random model of theirs with a tokenizer of its own."""
    texts = [sentence for seed in range(20) for sentence in small_store.sentences(seed, 30)]
    place = tmp_path_factory.mktemp("models")

    @functools.cache
    def vocabulary(kind: str) -> tokenizer.Tokenizer:
        name = tokenizer.TRAINED_FILES[kind]
        (place / kind).mkdir()
        options = tokenizer.Normalization()
        tokenizer.train(texts, place / kind / name, VOCABULARY[kind], options, kind=kind)
        return tokenizer.Tokenizer.load(place / kind / name, options)

    @functools.cache
    def made(family: str, suffix: str, **fields: Any) -> pathlib.Path:
        spoken = vocabulary(KINDS[family])
        model_class = getattr(transformers, CLASSES[family] + suffix)
        usual = {} if family == "distilbert" else USUAL
        fields = {"max_position_embeddings": LONGEST, **usual, **SIZES[family], **fields}
        if (tags := fields.pop("tags", None)) is not None:
            fields["id2label"] = dict(enumerate(tags))
        if suffix == "ForSequenceClassification":
            fields = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, **fields}
        torch.manual_seed(0)
        model = model_class(
            model_class.config_class(
                vocab_size=spoken.vocab_size, pad_token_id=spoken.pad_id, **fields
            )
        )
        with torch.no_grad():
            for parameter in model.parameters():
                # Large matrices: else all texts and words look alike to it.
                parameter += (0.4 if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter)
        found = place / f"{family}{suffix}{len(list(place.iterdir()))}"
        model.save_pretrained(found)
        for name, content in models.tokenizer_files(spoken, models.read(found)).items():
            (found / name).write_bytes(content)
        return found

    return made


@functools.cache
def load(path: pathlib.Path) -> Predictor:
    return albert_jax.load(path, batch_size=8)


@functools.cache
def theirs(path: pathlib.Path) -> tuple[Any, Any]:
    """The model in its own class, in evaluation mode, and its tokenizer."""
    config = transformers.AutoConfig.from_pretrained(path)
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(path, attn_implementation="eager").eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)


def run_theirs(path: pathlib.Path, *texts: str, **more: Any) -> Any:
    """What their model says of one text, or of one pair."""
    model, spoken = theirs(path)
    with torch.no_grad():
        return model(**spoken(*texts, return_tensors="pt"), **more)


def pieces(path: pathlib.Path, text: str) -> list[int]:
    return theirs(path)[1](text, add_special_tokens=False)["input_ids"]


def windows(path: pathlib.Path, text: str) -> list[list[int]]:
    """A long text's pieces in windows of what the model reads, special pieces around: half a window
    from one to the next, and the last one is as full as the others.
    """
    spoken, ids, room = theirs(path)[1], pieces(path, text), LONGEST - 2
    begins = [0]
    while begins[-1] + room < len(ids):
        begins.append(min(begins[-1] + room // 2, len(ids) - room))
    return [
        [spoken.cls_token_id, *ids[begin : begin + room], spoken.sep_token_id] for begin in begins
    ]


def pipeline(task: str, path: pathlib.Path, **options: Any) -> Any:
    return transformers.pipeline(task, model=str(path), device="cpu", **options)


@pytest.mark.parametrize("family", CLASSES)
def test_classes_are_those_of_the_pipeline(family: str, folder: Folder):
    path = folder(family, "ForSequenceClassification")
    classify = pipeline("text-classification", path, top_k=None)
    ours = load(path)
    pairs = [{"text": text, "text_pair": pair} for text, pair in zip(TEXTS, PAIRS, strict=True)]
    found = [*ours.classify(TEXTS), *ours.classify(TEXTS, PAIRS)]
    given = [*({"text": text} for text in TEXTS), *pairs]
    spread = 0.0
    for mine, said in zip(found, given, strict=True):
        other = {one["label"]: one["score"] for one in classify(said)}
        assert mine["probabilities"] == pytest.approx(other, abs=1e-5)
        assert mine["label"] == max(other, key=other.get)
        assert mine["probability"] == mine["probabilities"][mine["label"]]
        assert {key: mine.get(key) for key in said} == said
        assert "truncated" not in mine
        spread = max(spread, abs(mine["probability"] - found[0]["probability"]))
    assert spread > 1e-2, "the model does not tell the texts apart"


def test_numbers_and_several_labels_are_those_of_the_pipeline(folder: Folder):
    path = folder("albert", "ForSequenceClassification", num_labels=1, tags=("LABEL_0",))
    for text, mine in zip(TEXTS, load(path).classify(TEXTS), strict=True):
        assert set(mine) == {"text", "value"}
        assert mine["value"] == pytest.approx(run_theirs(path, text).logits.item(), abs=1e-5)
    several = "multi_label_classification"
    path = folder("bert", "ForSequenceClassification", problem_type=several)
    classify = pipeline("text-classification", path, top_k=None)
    for text, mine in zip(TEXTS, load(path).classify(TEXTS), strict=True):
        other = {one["label"]: one["score"] for one in classify({"text": text})}
        assert mine["probabilities"] == pytest.approx(other, abs=1e-5)
        assert set(mine["labels"]) == {name for name, share in other.items() if share > 0.5}


def test_a_text_of_any_length_gives_what_it_gives_alone(folder: Folder):
    """As do two in one batch, and many of them in several."""
    ours = load(folder("bert", "ForSequenceClassification"))
    texts = [TEXTS[0], LONG, "Rain", LONG[:80], *reversed(TEXTS), LONG[:290]]
    together = ours.classify(texts)
    assert [one["text"] for one in together] == texts
    for number in (0, 1, 2, 3):
        mine, (alone,) = together[number], ours.classify([texts[number]])
        assert mine["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-6)
    vectors = ours.embed(texts)
    for number in (1, 2):
        np.testing.assert_allclose(ours.embed([texts[number]])[0], vectors[number], atol=1e-6)


def test_no_texts_have_no_answers_and_a_pair_is_of_two(folder: Folder):
    ours = load(folder("bert", "ForSequenceClassification"))
    assert ours.classify([]) == []
    assert ours.embed([]).shape == (0, 24)
    assert ours.similarity([], []) == []
    with pytest.raises(ValueError, match="2 texts and 1 beside"):
        ours.classify(TEXTS[:2], PAIRS[:1])
    with pytest.raises(ValueError, match="1 texts and 2 beside"):
        ours.classify(TEXTS[:1], PAIRS[:2])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ours.similarity(TEXTS[:2], PAIRS[:1])


@pytest.mark.parametrize("family", ["albert", "roberta"])
def test_a_long_text_has_the_mean_of_its_windows(family: str, folder: Folder):
    path = folder(family, "ForSequenceClassification")
    shown = windows(path, LONG)
    assert len(shown) > 3
    with torch.no_grad():
        logits = theirs(path)[0](torch.tensor(shown)).logits
    wanted = logits.double().mean(dim=0).softmax(dim=-1)
    (mine,) = load(path).classify([LONG])
    assert list(mine["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert np.abs(logits.softmax(-1) - wanted).max() > 1e-2, "the windows do not differ"


def test_of_a_long_pair_the_longer_text_is_cut(folder: Folder):
    path = folder("albert", "ForSequenceClassification")
    text, pair = TEXTS[0], LONG
    _, spoken = theirs(path)
    encoded = spoken(
        text, pair, truncation="longest_first", max_length=LONGEST, return_tensors="pt"
    )
    short, long = len(pieces(path, text)), len(pieces(path, pair))
    assert short < (LONGEST - 3) // 2 < long, "the second text alone is to be cut"
    with torch.no_grad():
        wanted = theirs(path)[0](**encoded).logits[0].softmax(dim=-1)
    mine, whole = load(path).classify([text, "Rain"], [pair, "The cat."])
    assert list(mine["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert mine["truncated"] is True
    assert "truncated" not in whole


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """(type, first word, last word): B begins one, and so does I behind another type or none."""
    found: list[tuple[str, int, int]] = []
    for place, (before, tag) in enumerate(itertools.pairwise(["O", *tags])):
        if tag == "O":
            continue
        if tag[0] == "I" and before[2:] == tag[2:]:
            kind, first, _ = found.pop()
            found.append((kind, first, place))
        else:
            found.append((tag[2:], place, place))
    return found


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_entities_are_of_the_best_tags_at_first_pieces(family: str, folder: Folder):
    path = folder(family, "ForTokenClassification", tags=TAGS)
    model, spoken = theirs(path)
    texts = [*TEXTS, "  Élan: the cat-dog\tsees the horse .  "]
    seen = set()
    for text, mine in zip(texts, load(path).tag(texts), strict=True):
        spans = [match.span() for match in WORD.finditer(text)]
        ids, first = [spoken.cls_token_id], []
        for number, (start, end) in enumerate(spans):
            first.append(len(ids))
            space = " " if family == "roberta" and number else ""
            ids += pieces(path, space + text[start:end])
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, spoken.sep_token_id]])).logits[0, first]
        shares = logits.softmax(dim=-1).max(dim=-1).values.tolist()
        tags = [TAGS[number] for number in logits.argmax(dim=-1)]
        wanted = [
            {
                "type": kind,
                "text": text[spans[begin][0] : spans[last][1]],
                "start": spans[begin][0],
                "end": spans[last][1],
                "probability": pytest.approx(np.mean(shares[begin : last + 1]), abs=1e-5),
            }
            for kind, begin, last in entities(tags)
        ]
        assert mine == {"text": text, "entities": wanted}
        seen |= set(tags)
    assert len(seen) >= 2, "the model hardly tells words apart"


def test_a_long_sentence_is_tagged_in_parts(folder: Folder):
    """Between words, as many as the model reads; no word is lost."""
    path = folder("bert", "ForTokenClassification", tags=TAGS)
    model, spoken = theirs(path)
    rows: list[list[list[int]]] = [[]]
    for match in WORD.finditer(LONG):
        word = pieces(path, match.group())
        if sum(map(len, rows[-1])) + len(word) > LONGEST - 2:
            rows.append([])
        rows[-1].append(word)
    assert len(rows) > 2
    tags = []
    for row in rows:
        ids = [spoken.cls_token_id, *itertools.chain(*row), spoken.sep_token_id]
        first = np.cumsum([1, *map(len, row)])[:-1]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, first]
        tags += [TAGS[number] for number in logits.argmax(dim=-1)]
    spans = [match.span() for match in WORD.finditer(LONG)]
    (mine,) = load(path).tag([LONG])
    assert [(one["type"], one["start"], one["end"]) for one in mine["entities"]] == [
        (kind, spans[first][0], spans[last][1]) for kind, first, last in entities(tags)
    ]


@pytest.mark.parametrize("family", ["albert", "roberta"])
def test_answers_are_the_best_spans(family: str, folder: Folder):
    path = folder(family, "ForQuestionAnswering")
    _, spoken = theirs(path)
    questions = ["What sees the dog?", "Where?", "Who remembers the horse?"]
    contexts = ["The cat sees the dog.", TEXTS[3], "A horse, a sailor."]
    ours = load(path).answer(questions, contexts)
    for question, context, mine in zip(questions, contexts, ours, strict=True):
        encoded = spoken(question, context, return_offsets_mapping=True)
        spans = [
            # Theirs gives a space the letter behind it.
            (first, first if piece == "\u2581" else last)
            for piece, (first, last) in zip(
                encoded.tokens(), encoded["offset_mapping"], strict=True
            )
        ]
        of_context = [place for place, part in enumerate(encoded.sequence_ids()) if part == 1]
        output = run_theirs(path, question, context)
        begins, ends = output.start_logits[0].double(), output.end_logits[0].double()
        found = []
        for start, end in itertools.combinations_with_replacement(of_context, 2):
            if end - start < 30:
                first, last = spans[start][0], spans[end][1]
                text = context[first:last].strip()
                found.append((float(begins[start] + ends[end]), text, context.find(text, first)))
        found.sort(key=lambda one: -one[0])
        best: dict[str, tuple[float, int]] = {}
        for score, text, first in found[:20]:
            if text:
                best.setdefault(text, (score, first))
        shares = np.exp([score for score, _ in best.values()])
        wanted = [
            {
                "answer": text,
                "probability": pytest.approx(share, abs=1e-5),
                "start": first,
                "end": first + len(text),
            }
            for (text, (_, first)), share in zip(best.items(), shares / shares.sum(), strict=True)
        ]
        assert mine == {"question": question, **wanted[0], "others": wanted[1:5]}


def test_an_answer_is_found_in_any_window_of_a_long_context(folder: Folder):
    path = folder("albert", "ForQuestionAnswering")
    model, spoken = theirs(path)
    question = "Who forgets the house?"
    asked = pieces(path, question)
    encoded = spoken(LONG, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    room = LONGEST - 3 - len(asked)  # less than the stride of 128: windows lie side by side
    found = []
    for begin in range(0, len(ids), room):
        shown = ids[begin : begin + room]
        row = [spoken.cls_token_id, *asked, spoken.sep_token_id, *shown, spoken.sep_token_id]
        types = [0] * (len(asked) + 2) + [1] * (len(shown) + 1)
        with torch.no_grad():
            output = model(torch.tensor([row]), token_type_ids=torch.tensor([types]))
        inside = slice(len(asked) + 2, len(row) - 1)
        begins, ends = output.start_logits[0, inside], output.end_logits[0, inside]
        for start, end in itertools.combinations_with_replacement(range(len(shown)), 2):
            if end - start < 30:
                text = LONG[spans[begin + start][0] : spans[begin + end][1]].strip()
                found.append((float(begins[start] + ends[end]), text, begin))
    _, text, begin = max(one for one in found if one[1])
    assert begin > 0, "the first window alone would do"
    (mine,) = load(path).answer([question], [LONG])
    assert mine["answer"] == text == LONG[mine["start"] : mine["end"]]


@pytest.mark.parametrize("family", ["albert", "roberta", "distilbert"])
def test_guesses_are_those_of_the_pipeline(family: str, folder: Folder):
    path = folder(family, "ForMaskedLM")
    fill = pipeline("fill-mask", path, top_k=5)
    mask = fill.tokenizer.mask_token
    texts = [
        "The cat sees the [MASK] by the sea.",
        "The [MASK] likes the [MASK] near the bridge.",
        "[MASK] sailor remembers the horse near the bridge.",
    ]
    found = load(path).fill_mask(texts, top_k=5)
    for text, mine in zip(texts, found, strict=True):
        said = fill(text.replace("[MASK]", mask))
        said = [said] if isinstance(said[0], dict) else said
        assert len(mine) == len(said) == text.count("[MASK]")
        for guesses, others in zip(mine, said, strict=True):
            assert [share for _, share in guesses] == pytest.approx(
                [one["score"] for one in others], abs=1e-5
            )
            wanted = [fill.tokenizer.decode([one["token"]]).strip() for one in others]
            assert [piece.removeprefix("##") for piece, _ in guesses] == [
                piece.removeprefix("##") for piece in wanted
            ]


@pytest.mark.parametrize(
    ("family", "suffix"),
    [
        ("albert", "Model"),
        ("bert", "ForMaskedLM"),
    ],
)
def test_vectors_are_the_mean_state_of_length_one(family: str, suffix: str, folder: Folder):
    """Of whatever is on the encoder."""
    path = folder(family, suffix)
    means = [
        run_theirs(path, text, output_hidden_states=True).hidden_states[-1][0].double().mean(dim=0)
        for text in [*TEXTS, *PAIRS]
    ]
    wanted = torch.stack([mean / mean.norm() for mean in means]).numpy()
    ours = load(path)
    found = ours.embed(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted[:4], atol=1e-5)
    cosines = torch.cosine_similarity(torch.stack(means[:4]), torch.stack(means[4:]))
    assert ours.similarity(TEXTS, PAIRS) == pytest.approx(cosines.tolist(), abs=1e-5)
    assert cosines.max() - cosines.min() > 1e-2


def test_the_vector_of_a_long_text_points_between_those_of_its_windows(folder: Folder):
    path = folder("albert", "Model")
    with torch.no_grad():
        states = theirs(path)[0](torch.tensor(windows(path, LONG))).last_hidden_state.double()
    each = torch.nn.functional.normalize(states.mean(dim=1), dim=-1)
    wanted = torch.nn.functional.normalize(each.mean(dim=0), dim=-1)
    np.testing.assert_allclose(load(path).embed([LONG])[0], wanted.numpy(), atol=1e-5)


def test_a_model_with_another_head_is_named(folder: Folder):
    classes = load(folder("bert", "ForSequenceClassification"))
    for job, found in (
        ("answer", lambda: classes.answer(["Who?"], ["The cat."])),
        ("tag", lambda: classes.tag(["The cat."])),
    ):
        said = rf"{job} wants .* is a sequence classification model\."
        with pytest.raises(UserError, match=said):
            found()
    bare = load(folder("albert", "Model"))
    for call in (bare.classify, bare.explain):
        with pytest.raises(UserError, match="is a model with encoder alone"):
            call(["The cat."] if call == bare.classify else "The cat.")
    with pytest.raises(UserError, match=r"fine-tuned for question answering.* is a token class"):
        load(folder("bert", "ForTokenClassification", tags=TAGS)).answer(["Who?"], ["The cat."])
    with pytest.raises(UserError, match="no masked-word head; it is a sequence classification"):
        classes.fill_mask(["The [MASK]."])
    with pytest.raises(UserError, match="no masked-word head; it is a model with encoder alone"):
        bare.fill_mask(["The [MASK]."])
    with pytest.raises(UserError, match=r"no \[MASK\] in 'The cat\.'"):
        load(folder("bert", "ForMaskedLM")).fill_mask(["The cat."])


def test_a_folder_without_a_tokenizer_and_one_without_a_model(folder: Folder, tmp_path):
    model, _ = theirs(folder("bert", "ForSequenceClassification"))
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="has no tokenizer"):
        albert_jax.load(tmp_path / "bare")
    with pytest.raises(UserError, match="is no model"):
        albert_jax.load(tmp_path)


def test_a_run_of_ours_answers_as_the_folder_that_it_was_made_of(folder: Folder, tmp_path):
    path = folder("albert", "ForSequenceClassification")
    flags = [f"--model={path}", "--to=albert_jax", f"--output={tmp_path / 'run'}"]
    assert convert.main(flags) == 0
    texts = [*TEXTS, LONG]
    for mine, other in zip(
        albert_jax.load(tmp_path / "run").classify(texts), load(path).classify(texts), strict=True
    ):
        assert mine["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
        assert mine["label"] == other["label"]


def of_words(path: pathlib.Path, texts: tuple[str, ...], of_pieces: np.ndarray) -> list[float]:
    """What the pieces of each word, those that begin in it, have together."""
    encoded = theirs(path)[1](*texts, return_offsets_mapping=True)
    found = []
    for segment, text in enumerate(texts):
        begins = [match.start() for match in WORD.finditer(text)]
        sums = [0.0] * len(begins)
        for place, part in enumerate(encoded.sequence_ids()):
            if part == segment:
                start, end = encoded["offset_mapping"][place]
                start += len(text[start:end]) - len(text[start:end].lstrip())
                sums[[begin <= start for begin in begins].count(True) - 1] += of_pieces[place]
        found += sums
    return found


def test_attributions_are_the_integral_of_the_gradient(folder: Folder):
    path = folder("albert", "ForSequenceClassification")
    model, spoken = theirs(path)
    texts = TEXTS[0], PAIRS[0]
    encoded = spoken(*texts, return_tensors="pt")
    types = encoded["token_type_ids"]
    table = model.get_input_embeddings()
    whole = table(encoded["input_ids"]).detach()
    masked = whole.clone()
    content = [part is not None for part in encoded.sequence_ids()]
    masked[:, content] = table(torch.tensor(spoken.mask_token_id)).detach()
    with torch.no_grad():
        both = torch.cat([masked, whole])
        ends = model(inputs_embeds=both, token_type_ids=types.expand(2, -1)).logits
    chosen = int(ends[1].argmax())
    steps, slope = 2000, torch.zeros_like(whole[0], dtype=torch.float64)
    for part in ((torch.arange(steps) + 0.5) / steps).split(250):
        way = (masked + part[:, None, None] * (whole - masked)).requires_grad_()
        logits = model(inputs_embeds=way, token_type_ids=types.expand(len(way), -1)).logits
        (slopes,) = torch.autograd.grad(logits[:, chosen].sum(), way)
        slope += slopes.double().sum(dim=0) / steps
    added = (slope * (whole - masked)[0]).sum(dim=-1).numpy()
    wanted = of_words(path, texts, added)

    found = load(path).explain(*texts)
    assert found.texts == texts
    assert found.label == model.config.id2label[chosen]
    assert found.score == pytest.approx(ends[1, chosen].item(), abs=1e-5)
    assert found.masked_score == pytest.approx(ends[0, chosen].item(), abs=1e-5)
    assert [word.text for word in found.words] == [*WORD.findall(TEXTS[0]), *WORD.findall(PAIRS[0])]
    assert all(texts[word.segment][word.start : word.end] == word.text for word in found.words)
    mine = [word.attribution for word in found.words]
    assert abs(found.score - found.masked_score) > 0.05
    assert mine == pytest.approx(wanted, abs=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("family", "texts"),
    [
        ("albert", (TEXTS[0], PAIRS[0])),
        ("roberta", (TEXTS[0], PAIRS[0])),
    ],
)
def test_attributions_add_up_and_rollout_follows_the_attentions(family, texts, folder: Folder):
    path = folder(family, "ForSequenceClassification")
    found = load(path).explain(*texts)
    difference = found.score - found.masked_score
    assert abs(difference) > 1e-2
    assert sum(word.attribution for word in found.words) == pytest.approx(difference, rel=0.01)
    output = run_theirs(path, *texts, output_attentions=True)
    logits = output.logits[0]
    assert found.score == pytest.approx(logits.max().item(), abs=1e-5)
    flow = None
    for heads in output.attentions:
        mean = heads[0].double().mean(dim=0).numpy()
        mixed = (mean + np.eye(len(mean))) / 2
        flow = mixed if flow is None else mixed @ flow
    assert flow[0].sum() == pytest.approx(1.0)
    wanted = of_words(path, texts, flow[0])
    assert [word.rollout for word in found.words] == pytest.approx(wanted, abs=1e-5)
    assert [word.segment for word in found.words] == [
        segment for segment, text in enumerate(texts) for _ in WORD.finditer(text)
    ]


def test_an_explanation_is_json_and_a_page_without_the_texts_own_tags(folder: Folder):
    ours = load(folder("distilbert", "ForSequenceClassification"))
    text = 'The <b>cat</b> & "dog"'
    found = ours.explain(text)
    difference = found.score - found.masked_score
    assert sum(word.attribution for word in found.words) == pytest.approx(difference, rel=0.01)
    record = json.loads(json.dumps(found.record()))
    assert record["texts"] == [text]
    assert record["label"] in ours.labels
    assert [word["text"] for word in record["words"]] == WORD.findall(text)
    assert set(record["words"][0]) == {
        *("text", "start", "end", "segment"),
        *("attribution", "rollout"),
    }
    page = found.html()
    assert "<b>" not in page
    assert "</b>" not in page
    shown = [html.unescape(word) for word in re.findall(r"<span [^>]*>(.*?)</span>", page)]
    assert shown == WORD.findall(text)
    plain = html.unescape(re.sub(r"<[^>]*>", "", page.split("<p>")[1]))
    assert plain.startswith(text)
    with pytest.raises(UserError, match=f"this model reads {LONGEST} at most"):
        ours.explain(LONG)


def test_the_command_prints_what_the_models_say(folder: Folder, tmp_path):
    """One as it is typed, on its own devices, reading what is piped in; the others in here."""
    classes = folder("albert", "ForSequenceClassification")
    tags = folder("bert", "ForTokenClassification", tags=TAGS)
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"{text}\n\n" for text in TEXTS), encoding="utf-8")
    pair = f"{TEXTS[0]}\t{PAIRS[0]}"
    vectors, page = tmp_path / "vectors.npy", tmp_path / "why.html"
    said = {
        job: small_store.run_here("predict", job, *flags).stdout
        for job, flags in {
            "tag": [f"--model={tags}", *TEXTS[:2]],
            "embed": [f"--model={classes}", f"--input={lines}", f"--output={vectors}"],
            "similarity": [f"--model={classes}", pair],
            "explain": [f"--model={classes}", f"--html={page}", pair],
        }.items()
    }
    alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        small_store.command("predict", "classify", f"--model={classes}"),
        input=f"{pair}\nRain\t{PAIRS[1]}\n\n",
        capture_output=True,
        text=True,
        env=alone,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said["classify"] = done.stdout
    found = {
        job: [json.loads(line) for line in output.splitlines()]
        for job, output in said.items()
        if job != "embed"
    }

    ours = load(classes)
    for mine, other in zip(
        found["classify"], ours.classify([TEXTS[0], "Rain"], PAIRS[:2]), strict=True
    ):
        assert mine == other | {
            "probability": pytest.approx(other["probability"], abs=1e-6),
            "probabilities": pytest.approx(other["probabilities"], abs=1e-6),
        }
    tagged = load(tags).tag(TEXTS[:2])
    for mine, other in zip(found["tag"], tagged, strict=True):
        for one in (*mine["entities"], *other["entities"]):
            one["probability"] = pytest.approx(one["probability"], abs=1e-6)
        assert mine["text"] == other["text"]
        assert len(mine["entities"]) == len(other["entities"])
    assert said["embed"] == f"{vectors}: 4 vectors of 24, float32\n"
    written = np.load(vectors, allow_pickle=False)
    np.testing.assert_allclose(written, ours.embed(TEXTS), atol=1e-6)
    (cosine,) = found["similarity"]
    assert cosine["similarity"] == pytest.approx(float(written[0] @ ours.embed(PAIRS[:1])[0]))
    assert (cosine["text"], cosine["text_pair"]) == (TEXTS[0], PAIRS[0])
    (why,) = found["explain"]
    explained = ours.explain(TEXTS[0], PAIRS[0])
    assert why["label"] == explained.label
    assert [word["attribution"] for word in why["words"]] == pytest.approx(
        [word.attribution for word in explained.words], abs=1e-4
    )
    assert all(f">{word.text}<" in page.read_text() for word in explained.words)


def test_without_text_the_command_says_so_in_a_line(folder: Folder, tmp_path):
    path = folder("albert", "ForSequenceClassification")
    (tmp_path / "empty.txt").write_text("\n \n")
    for job, flags, wanted in (
        ("classify", [f"--input={tmp_path / 'empty.txt'}"], "there is no text"),
        ("tag", [f"--input={tmp_path / 'none.txt'}"], "none.txt cannot be read"),
    ):
        done = small_store.run_here("predict", job, f"--model={path}", *flags, expect=1)
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert wanted in done.stderr
        assert done.stderr.count("\n") == 1
