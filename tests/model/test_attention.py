"""Which attention a config gets, and that a kernel is refused by the field to change."""

import dataclasses

import pytest

from albert_jax import config
from albert_jax.errors import UserError
from albert_jax.model import attention

XXLARGE = config.ModelConfig(
    vocab_size=100, hidden_size=4096, num_attention_heads=64, intermediate_size=16384
)


@pytest.mark.parametrize(
    ("platform", "length", "change", "chosen"),
    [
        ("tpu", 512, {}, "flash"),
        ("gpu", 512, {}, "cudnn"),
        ("cpu", 512, {}, "xla"),
        ("tpu", 512, {"attention_probs_dropout_prob": 0.1}, "xla"),
        ("gpu", 512, {"attention_probs_dropout_prob": 0.1}, "xla"),
        ("gpu", 512, {"dtype": "float32"}, "xla"),
        ("tpu", 100, {}, "xla"),
        ("tpu", 512, {"num_attention_heads": 16}, "xla"),
    ],
)
def test_auto_is_the_platforms_kernel_where_it_can_do_the_work(platform, length, change, chosen):
    cfg = dataclasses.replace(XXLARGE, **change)
    assert attention.choose(cfg, length, platform) == chosen


def test_packed_rows_go_to_a_kernel_that_keeps_pairs_apart():
    assert attention.choose(XXLARGE, 512, "tpu", packing=True) == "flash"
    assert attention.choose(XXLARGE, 512, "gpu", packing=True) == "xla"
    cudnn = dataclasses.replace(XXLARGE, attention="cudnn")
    with pytest.raises(UserError, match=r"model\.attention=cudnn: does not keep .* data\.packing"):
        attention.choose(cudnn, 512, "gpu", packing=True)


def test_heads_are_counted_on_one_device():
    one_head = dataclasses.replace(XXLARGE, num_attention_heads=64)
    assert attention.choose(one_head, 512, "tpu", shards=32) == "flash"
    assert attention.choose(one_head, 512, "tpu", shards=64) == "xla"  # kernels take them by two


@pytest.mark.parametrize(
    ("implementation", "platform", "length", "change", "message"),
    [
        ("flash", "cpu", 512, {}, "runs on a TPU, and this is a CPU; set it to auto or xla"),
        ("cudnn", "tpu", 512, {}, "runs on a GPU"),
        (
            "splash",
            "tpu",
            512,
            {"attention_probs_dropout_prob": 0.1},
            "model.attention_probs_dropout_prob=0.1 to 0",
        ),
        ("flash", "tpu", 200, {}, "data.max_seq_length=200"),
        ("cudnn", "gpu", 512, {"dtype": "float32"}, "model.dtype=bfloat16"),
    ],
)
def test_what_cannot_be_is_refused_with_the_field(
    implementation, platform, length, change, message
):
    cfg = dataclasses.replace(XXLARGE, attention=implementation, **change)
    with pytest.raises(UserError, match=message):
        attention.choose(cfg, length, platform)
