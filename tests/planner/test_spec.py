"""What follows from a model's shape, by hand."""

from dataclasses import replace
from typing import Any

import pytest

from attnspan.planner.configs import from_config
from attnspan.planner.presets import model
from attnspan.planner.spec import ModelSpec

GEMMA3N = from_config(
    {
        "model_type": "gemma3n_text",
        "num_hidden_layers": 10,
        "num_kv_shared_layers": 5,
        "sliding_window": 64,
    }
)


def test_layers_that_share_hold_nothing() -> None:
    assert GEMMA3N.windows == (64, 64, 64, 64, None) * 2
    assert GEMMA3N.shares == (None,) * 5 + (3, 3, 3, 3, 4)
    assert GEMMA3N.owners == (0, 1, 2, 3, 4)
    assert GEMMA3N.full_layers == (4, 9)
    assert GEMMA3N.sliding_layers == (0, 1, 2, 3, 5, 6, 7, 8)
    widths = [GEMMA3N.kv_width(layer) for layer in range(10)]
    assert widths == [2 * 2 * 256] * 5 + [0] * 5
    assert GEMMA3N.kv_bytes() == 2 * 5 * 2 * 256 * 2


def test_latents() -> None:
    spec = model("deepseek-v3")
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.value_dim) == (128, 128, 192, 128)
    assert spec.kv_width(0) == 512 + 64
    assert spec.kv_width(60, expanded=True) == 128 * (192 + 128)
    assert spec.owners == tuple(range(61))
    assert model("mistral-7b").value_dim == 128


def test_experts() -> None:
    spec = model("mixtral-8x7b")
    one = 3 * 4096 * 14336
    assert spec.feed_forward == 32 * 8 * one
    assert spec.active_feed_forward == 32 * 2 * one
    assert spec.active_parameters == spec.parameters - 32 * 6 * one
    assert spec.linear_parameters == spec.active_parameters - 2 * 32000 * 4096
    assert spec.inner_width == 2 * 14336
    spec = model("deepseek-v3")
    assert spec.experts is not None
    assert (spec.experts.layers, spec.experts.shared) == (58, 1)
    assert (spec.intermediate, spec.inner_width) == (18432, 18432)  # of 9 experts of 2,048 as well
    assert spec.active_feed_forward == 3 * 7168 * (3 * 18432 + 58 * 9 * 2048)
    dense = model("llama-3.1-8b")
    assert dense.active_parameters == dense.parameters
    assert dense.active_feed_forward == dense.feed_forward == 32 * one
    assert dense.inner_width == 14336


def seen(spec: ModelSpec) -> int:
    """The reach by going through all tokens: which of them each token's output depends on."""
    n = 60
    depends = [[{i} for i in range(n)]]  # by layer, of the hidden states that go into it
    for layer, window in enumerate(spec.windows):
        before = depends[-1]
        source = spec.shares[layer] if spec.shares else None
        keys = before if source is None else depends[source]
        after = []
        for i in range(n):
            least = 0 if window is None else i - window + 1
            if spec.chunked and window is not None:
                least = i // window * window
            after.append(before[i].union(*(keys[j] for j in range(max(least, 0), i + 1))))
        depends.append(after)
    return max(i - min(each) for i, each in enumerate(depends[-1]))


def shaped(windows: tuple[int | None, ...], **more) -> ModelSpec:
    return replace(model("mistral-7b"), layers=len(windows), windows=windows, **more)


@pytest.mark.parametrize(
    "spec",
    [
        shaped((4,)),
        shaped((4, 4, 4)),
        shaped((4, 1, 9)),
        shaped((4, 4, 9), shares=(None, None, 0)),
        shaped((4, 4, 9, 9), shares=(None, None, 0, 1)),
        shaped((3, 8, 3, 3), shares=(None, None, 0, 0)),
        shaped((7, 7, 7), chunked=True),
    ],
)
def test_the_bound_of_the_reach_is_met_and_not_passed(spec: Any) -> None:
    assert spec.reach == seen(spec)
    if not spec.chunked:
        wider = [
            replace(spec, windows=(*spec.windows[:i], spec.windows[i] + 1, *spec.windows[i + 1 :]))
            for i in range(spec.layers)
        ]
        assert [more.reach for more in wider] == [seen(more) for more in wider]
        assert {more.reach for more in wider} != {spec.reach}


def test_reach_where_there_is_no_bound() -> None:
    assert model("llama-3.1-8b").reach is None
    assert model("gpt-oss-20b").reach is None
    assert shaped((4, None, 4)).reach is None
    assert shaped((4, None, 4), chunked=True).reach is None
    assert model("mistral-7b").reach == 131_040
