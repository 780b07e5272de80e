"""Model FLOPs against published figures; metrics.jsonl after a kill; pictures of any run."""

import json

import pytest

from albert_jax import config
from albert_jax.training import report, telemetry


@pytest.mark.parametrize(
    ("size", "short", "long"),
    [
        ((12, 768, 12), 67.6, 292),
        ((24, 1024, 16), 237, 1007),
        ((24, 2048, 16), 938, 3868),
        ((12, 4096, 64), 1866, 7580),
    ],
)
def test_model_flops_per_sequence_are_the_published_ones(size, short, long):
    depth, hidden, heads = size
    model = config.ModelConfig(
        num_hidden_layers=depth,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        attention_groups=depth,  # sharing parameters saves no operation
    )
    for length, slots, expected in ((128, 20, short), (512, 77, long)):
        data = config.DataConfig(max_seq_length=length, max_predictions_per_seq=slots)
        flops = telemetry.model_flops_per_sequence(model, data)
        assert flops / 1e9 == pytest.approx(expected, rel=5e-3)


def test_only_places_that_see_each_other_count_as_attention():
    # Per depth: projections 4 D^2 + 2 D F a place, scores and context 2 * 2 D a pair of places;
    # heads as of any row; a product is 2 operations a multiplication, three times for a step.
    model = config.ModelConfig(
        vocab_size=50,
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
    )
    data = config.DataConfig(max_seq_length=32, max_predictions_per_seq=5)
    depth = 32 * 2 * (4 * 16 * 16 + 2 * 16 * 40) + 4 * 16 * (10**2 + 12**2 + 8**2)
    heads = 2 * 5 * 16 * (16 + 50) + 2 * 16 * 16
    flops = telemetry.model_flops_per_sequence(model, data, attended=10**2 + 12**2 + 8**2)
    assert flops == 3 * (3 * depth + heads)


def test_a_restart_takes_back_later_lines_and_one_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1}, {"step": 2}, {"step": 2, "split": "validation"}, {"step": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    log = telemetry.MetricsLog(tmp_path, resumed_step=2)
    log.write(3, {"loss": 1.5, "model_flops_utilization": None})
    log.close()
    expected = [*rows[:3], {"step": 3, "loss": 1.5, "model_flops_utilization": None}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected


@pytest.mark.parametrize("objective", ["sop", "none"])
def test_pictures_can_be_drawn_before_there_is_anything_to_see(tmp_path, objective):
    model = config.ModelConfig(sentence_objective=objective)
    (tmp_path / "config.json").write_text(config.Config(model=model).to_json())
    overview = report.draw(tmp_path, None)
    assert overview.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report" / "sentence_loss.png").exists() == (objective == "sop")
