"""The leak meter on real novels: sentence order is at chance, what changes the topic is not."""

import pathlib

import pytest
import small_store

from albert_jax.data import leak, store

NOVELS = 10
CHANCE = 2  # standard errors


@pytest.fixture(scope="module")
def novels(shared_data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> store.Store:
    folder = tmp_path_factory.mktemp("novels")
    sources = sorted(
        (shared_data / "corpus" / "en_novels").glob("*.txt"), key=lambda f: f.stat().st_size
    )
    small_store.run_command(
        "prepare",
        *(f"--input={source}" for source in sources[:NOVELS]),
        "--document=file",
        f"--output={folder / 'store'}",
        f"--tokenizer={shared_data / 'tokenizer' / 'spiece.model'}",
        "--validation_fraction=0.4",
        "--workers=1",
    )
    return store.open_store(folder / "store")


def measured(data: store.Store, objective: str, single_sentence: str) -> leak.Leak:
    return leak.measure(data, objective, single_sentence, 64, 20_000)["together"]


def test_words_say_nothing_of_sentence_order(novels):
    found = measured(novels, "sop", "split")
    print(f"sop, split: {found.accuracy:.3f}, {found.deviation:+.1f} standard errors")
    assert abs(found.deviation) < CHANCE
    assert found.pairs > 3000


@pytest.mark.parametrize(("objective", "single"), [("nsp", "split"), ("sop", "random_next")])
def test_words_give_a_random_second_segment_away(novels, objective, single):
    found = measured(novels, objective, single)
    print(f"{objective}, {single}: {found.accuracy:.3f}, {found.deviation:+.1f} standard errors")
    assert found.deviation > CHANCE
