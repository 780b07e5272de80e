"""Config files load, overrides reach their field, and what is wrong is refused by name."""

import pathlib

import jax
import pytest

from albert_jax import config
from albert_jax.errors import UserError
from albert_jax.model import pretraining
from albert_jax.training import objectives

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
TINY = str(CONFIGS / "tiny.py")


FILES = [path for path in sorted(CONFIGS.glob("*.py")) if "def get_config" in path.read_text()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_config_file_loads_and_warns_of_nothing(path):
    cfg = config.load(f"{path}:mrpc" if path.name == "glue.py" else str(path))
    assert config.recipe_warnings(cfg) == []


@pytest.mark.parametrize("size", ["base", "large", "xlarge", "xxlarge"])
def test_published_recipes(size):
    v1, v2 = (config.load(f"{CONFIGS / size}.py:{recipe}") for recipe in ("v1", "v2"))
    dropout = 0.0 if size == "xxlarge" else 0.1
    assert (v1.model.hidden_dropout_prob, v1.model.attention_probs_dropout_prob) == (dropout,) * 2
    assert v2.model.hidden_dropout_prob == 0.0
    assert v1.train.steps == 125_000
    assert v2.train.steps == (10_000_000 if size == "base" else 3_000_000)
    for cfg in (v1, v2):
        assert (cfg.train.global_batch_size, cfg.optimizer.learning_rate) == (4096, 0.00176)
        assert (cfg.optimizer.warmup_steps, cfg.data.max_seq_length) == (3125, 512)


def parameters(file: str) -> dict[str, int]:
    cfg = config.load(str(CONFIGS / file))
    shapes = jax.eval_shape(
        lambda: objectives.Pretraining(pretraining.PretrainingModel(cfg.model)).init_params(0)
    )
    return {
        part: sum(leaf.size for leaf in jax.tree.leaves(leaves)) for part, leaves in shapes.items()
    }


# Without heads, and with them; of the models that their authors published.
@pytest.mark.parametrize(
    ("file", "backbone", "whole"),
    [
        ("base.py", 11_683_584, 11_813_810),
        ("large.py", 17_683_968, 17_847_474),
        ("xlarge.py", 58_724_864, 59_021_490),
        ("xxlarge.py", 222_595_584, 223_158_450),
        ("bert_base.py", 109_482_240, 110_106_428),
        ("bert_large.py", 335_141_888, 336_226_108),
        ("roberta_base.py", 124_055_040, 124_697_433),
        ("roberta_large.py", 354_310_144, 355_412_057),
        ("distilbert_base.py", 66_362_880, 66_985_530),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(file, backbone, whole):
    counts = parameters(file)
    heads = counts["masked_lm"] + counts.get("sentence_order", 0)
    assert (sum(counts.values()) - heads, sum(counts.values())) == (backbone, whole)


# One layer of 768 has 2,363,904 + 4,723,968 parameters, attention's and the feed-forward half's.
@pytest.mark.parametrize(
    ("changes", "part", "expected"),
    [
        ("", "encoder", 2_363_904 + 4_723_968),
        ("sharing=attention", "encoder", 2_363_904 + 12 * 4_723_968),
        ("sharing=ffn,depth=3", "encoder", 3 * 2_363_904 + 4_723_968),
        ("sharing=none,depth=24", "encoder", 24 * (2_363_904 + 4_723_968)),
        ("depth=24,sharing=none", "encoder", 24 * (2_363_904 + 4_723_968)),
        ("embedding=64", "embeddings", 64 * (30_000 + 512 + 2 + 2) + 65 * 768),
        ("embedding=768", "embeddings", 768 * (30_000 + 512 + 2 + 2)),
        ("width=1024", "pooler", 1024 * 1025),
    ],
)
def test_ablations_have_the_parameters_they_should(changes, part, expected):
    assert parameters(f"ablation.py:{changes}")[part] == expected


def test_ablations_change_what_they_name_and_refuse_what_is_none():
    ablation = str(CONFIGS / "ablation.py")
    base = config.load(f"{CONFIGS / 'base.py'}:v1")
    assert config.load(ablation) == base
    cfg = config.load(f"{ablation}:objective=nsp,dropout=0,width=2048")
    assert (cfg.model.sentence_objective, cfg.model.hidden_dropout_prob) == ("nsp", 0.0)
    assert (cfg.model.num_attention_heads, cfg.model.intermediate_size) == (32, 8192)
    assert cfg.optimizer == base.optimizer
    for changes, message in (
        ("colour=red", "no ablation 'colour'; there are: embedding=, depth=, width=, sharing="),
        ("sharing=some", "sharing='some' is not possible; it takes all | attention | ffn | none"),
        ("depth=", "depth='' is not possible; it takes a whole number"),
        ("width=100", "width='100' is not possible; it takes a multiple of 64"),
        ("depth=3,depth=4", "depth is given twice"),
    ):
        with pytest.raises(UserError) as error:
            config.load(f"{ablation}:{changes}")
        assert message in str(error.value)


def test_overrides_reach_their_fields_whatever_their_type():
    cfg = config.load(
        TINY,
        ["train.steps=12_000", "optimizer.weight_decay=0", "model.dtype=bfloat16", "mesh.fsdp=2"],
    )
    assert (cfg.train.steps, cfg.optimizer.weight_decay) == (12_000, 0.0)
    assert (cfg.model.dtype, cfg.mesh.fsdp) == ("bfloat16", 2)


def test_config_json_gives_the_same_config_back(tmp_path):
    cfg = config.load(TINY, ["data.path=somewhere"])
    (tmp_path / "config.json").write_text(cfg.to_json())
    assert config.read_workdir(tmp_path) == cfg


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", r"no field train.stepz; did you mean train.steps\?"),
        ("trian.steps=5", r"no section trian; did you mean train\?"),
        ("train=5", "no field train"),
        ("train.steps=many", "train.steps='many' is not a whole number"),
        ("train.steps=1.5", "train.steps=1.5 is not a whole number"),
        ("train.steps=0", "train.steps=0 is too small; it must be at least 1"),
        ("train.steps", "train.steps has no value"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate='fast' is not a number"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate=-1.0 must be more than 0"),
        ("optimizer.learning_rate=nan", "not a finite number"),
        ("optimizer.name=sgd", "optimizer.name='sgd' is none of: lamb, adamw"),
        (
            "model.num_attention_heads=3",
            "does not divide model.hidden_size=.*nearest that do: 2 and 4",
        ),
        ("model.attention_groups=9", "between 0 and model.num_hidden_layers="),
        ("model.hidden_dropout_prob=1", "model.hidden_dropout_prob=1.0 is out of range"),
        ("model.dtype=float16", "model.dtype='float16' is none of: bfloat16, float32"),
        ("data.max_seq_length=9999", "longer than model.max_position_embeddings=64"),
        ("data.max_predictions_per_seq=65", "between 1 and data.max_seq_length=64"),
        ("mesh.data=0", "mesh.data=0 is no number of devices"),
        ("mesh.fsdp=-1", "only one axis can be -1"),
    ],
)
def test_impossible_overrides_are_refused_by_name(override, message):
    with pytest.raises(UserError, match=message):
        config.load(TINY, [override])


def test_a_config_file_that_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file nowhere\.py"):
        config.load("nowhere.py")
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(arg=''):\n    return colour\n")
    with pytest.raises(UserError, match="NameError: name 'colour' is not defined"):
        config.load(str(broken))
    misspelt = tmp_path / "misspelt.py"
    misspelt.write_text(
        "from albert_jax import config\n"
        "def get_config(arg=''):\n"
        "    c = config.default_config()\n"
        "    c.train.stepz = 5\n"
        "    return c\n"
    )
    with pytest.raises(UserError, match="stepz"):
        config.load(str(misspelt))


def test_recipe_guard_names_the_value_that_fits():
    base = str(CONFIGS / "base.py:v1")
    assert config.recipe_warnings(config.load(base)) == []
    small = config.load(base, ["train.global_batch_size=512"])
    [rate, warmup] = config.recipe_warnings(small)
    assert "optimizer.learning_rate=0.00176" in rate
    assert "0.000625 fits" in rate
    assert "391 fits" in warmup
    fitting = ["optimizer.learning_rate=0.000625", "optimizer.warmup_steps=391"]
    assert (
        config.recipe_warnings(config.load(base, ["train.global_batch_size=512", *fitting])) == []
    )
    [endless] = config.recipe_warnings(config.load(TINY, ["optimizer.warmup_steps=999_999"]))
    assert "never reaches its peak" in endless
    [few] = config.recipe_warnings(config.load(base, ["data.max_predictions_per_seq=20"]))
    assert "77 would mask 15 %" in few


def test_only_what_changes_no_number_may_differ_in_a_workdir():
    ours = config.load(TINY)
    moved = config.load(TINY, ["mesh.data=2", "train.microbatch_size=4", "data.path=elsewhere"])
    assert config.differing_fields(moved, ours) == []
    [field] = config.differing_fields(config.load(TINY, ["optimizer.learning_rate=0.1"]), ours)
    assert field.startswith("optimizer.learning_rate: 0.00")
    assert field.endswith("there, 0.1 now")
