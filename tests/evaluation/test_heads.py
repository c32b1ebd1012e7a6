"""What heads attend to, against transformers' own weights; windows that layers see."""

import pytest
import torch
from tiny import random_ids, tiny

from attnspan.evaluation import bands, heads
from attnspan.models import attach
from attnspan.models.anatomy import anatomy_of
from attnspan.policies import KeepAll, PerHead, PerLayer, SinkWindow

FAMILIES = ["llama", "mistral-sliding", "gemma3", "gpt_oss", "qwen3", "cohere2", "granite"]
N = 100


def windows_of(model):
    return [layer.sliding_window for layer in anatomy_of(model).layers]


def weights_of(model, ids):
    """Each layer's weights, `(heads, n, n)`, and what of them no key has, from transformers."""
    with torch.no_grad():
        found = model(input_ids=ids[None], use_cache=False, output_attentions=True).attentions
    return [layer[0].double() for layer in found]


def by_hand(model, texts, near):
    """Loops over queries, in float64."""
    token0, first, close = [], [], []
    for layer, window in enumerate(windows_of(model)):
        start = 50 if window is None else window // 2
        seen, rest, nearby = [], 0.0, 0.0
        for ids in texts:
            w = weights_of(model, ids)[layer]
            for i in range(start, N):
                if window is None or i < window:
                    seen.append((w[:, i, 0], w[:, i, :4].sum(-1)))
                rest = rest + w[:, i, 4:].sum(-1)
                nearby = nearby + w[:, i, max(4, i - near + 1) : i + 1].sum(-1)
        token0.append(torch.stack([a for a, _ in seen]).mean(0))
        first.append(torch.stack([b for _, b in seen]).mean(0))
        close.append(nearby / rest)
    return torch.stack(token0), torch.stack(first), torch.stack(close)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_what_transformers_gives(family):
    model = tiny(family)
    texts = list(random_ids(N, 2))
    found = heads.measure(model, texts)
    token0, first, near = by_hand(model, texts, found.window)
    # float32 weights, summed in float64.
    torch.testing.assert_close(found.token0, token0, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.first, first, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.near, near, rtol=1e-4, atol=1e-6)
    # The oracle can fail: another width of what is near, another text.
    assert not torch.allclose(by_hand(model, texts, found.window // 4)[2], near, rtol=1e-4)
    assert not torch.allclose(by_hand(model, texts[::-1][:1], found.window)[0], token0, rtol=1e-4)


def test_a_learned_sink_takes_what_no_key_has():
    model = tiny("gpt_oss")
    ids = random_ids(N)[0]
    found = heads.measure(model, [ids])
    for layer, window in enumerate(windows_of(model)):
        left = 1 - weights_of(model, ids)[layer].sum(-1)
        expected = left[:, 50 if window is None else window // 2 :].mean(-1)
        torch.testing.assert_close(found.learned[layer], expected, rtol=1e-3, atol=1e-6)
    assert found.learned.min() > 0
    assert not heads.measure(tiny("llama"), [ids]).learned.any()


def test_blocks_don_t_change_the_figures(monkeypatch):
    model, texts = tiny("gemma3"), list(random_ids(N, 1))
    whole = heads.measure(model, texts)
    monkeypatch.setattr(heads, "_BLOCK", 7)
    small = heads.measure(model, texts)
    for name in ("token0", "first", "near", "copy"):
        torch.testing.assert_close(getattr(small, name), getattr(whole, name))


def test_copies_are_counted_where_they_are_made():
    """Head 0 attends to what followed the first copy, head 1 to the copy itself, head 2 to BOS."""
    half, n = 10, 21
    weights = torch.zeros(3, n, n)
    for i in range(n):
        weights[0, i, max(0, i - half + 1)] = 1
        weights[1, i, max(0, i - half)] = 1
        weights[2, i, 0] = 0.9
        weights[2, i, max(0, i - half + 1)] = 0.1
    for block in (n, 4):
        sums = heads._Sums(None, 4, n)
        take = sums.copies(half, True)
        for start in range(0, n, block):
            take(weights[:, start : start + block], torch.zeros(3, block), start)
        # BOS, ten tokens, the same ten: those at 11 to 19 have a next one to copy, which for 11 and
        # 12 is one of the first four.
        assert sums.copyable == 7
        # Sinks are left out, as they would hide what else a head looks at.
        assert (sums.copied / sums.copyable).tolist() == [1, 0, 1]


def test_kinds_of_heads():
    values = torch.tensor([[0.31, 0.30, 0.0, 0.0]], dtype=torch.float64)
    near = torch.tensor([[0.95, 0.2, 0.95, 0.1]], dtype=torch.float64)
    copy = torch.tensor([[0.0, 0.1, 0.2, 0.05]], dtype=torch.float64)
    found = heads.Heads(values, values, near, 0 * values, copy, 16, 256, (10,))
    told = found.as_dict()
    assert told["sink_heads"] == [[0, 0]]  # above 0.3, not at it
    assert told["retrieval_heads"] == [[0, 1], [0, 2]]
    assert told["local_heads"] == [[0, 0]]
    assert told["sink_share"] == 0.25
    # Two query heads share a KV head: the first and the second retrieve.
    assert found.retrieving(2).tolist() == [[True, True]]
    assert found.retrieving(4).tolist() == [[False, True, True, False]]
    far, near_policy = KeepAll(), SinkWindow(4, 60)
    assert found.policy(2, far, near_policy) == PerLayer((far,))
    heads_of = PerHead((near_policy, far, far, near_policy))
    assert found.policy(4, far, near_policy) == PerLayer((heads_of,))


def test_a_wrong_mask_is_refused():
    """Weights that don't give the model's outputs are not reported."""
    model = tiny("mistral-sliding")
    with (
        pytest.raises(ValueError, match="don't give its outputs"),
        torch.no_grad(),
    ):
        heads._run(model, random_ids(N)[0], [13] * 4, [lambda *_: None] * 4)
    heads._run(model, random_ids(N)[0], [12] * 4, [lambda *_: None] * 4)


def test_short_texts_are_refused():
    with pytest.raises(ValueError, match="texts have 20 tokens; 24 or more"):
        heads.measure(tiny("llama"), [random_ids(20)[0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_see_the_windows_that_they_are_called_with(family):
    model = tiny(family)
    found = bands.examine(model, random_ids(N)[0], windows_of(model))
    assert found.seen == found.windows
    assert found.agrees is True
    assert ("have a window of 12" in found.sentence) == (12 in found.windows)


def test_a_window_that_isn_t_what_it_says_is_caught():
    model, ids = tiny("mistral-sliding"), random_ids(N)[0]
    for wrong in (11, 13):
        found = bands.examine(model, ids, [wrong] * 4)
        assert found.agrees is False
        assert "the layers really see [12]" in found.sentence
    # Mistral's reference keeps one more than Hugging Face: the same, said of the model as it runs.
    import attnspan as span

    with attach(tiny("llama"), span.SlidingWindow(12)) as attached:
        assert bands.examine(attached, ids, [12] * 4).seen == (12,) * 4


@pytest.mark.parametrize(("window", "agrees"), [(91, True), (92, None), (99, None)])
def test_a_window_that_ends_with_the_text_is_neither_agreed_to_nor_denied(window, agrees):
    # The token at 8 is changed: a query sees it up to 8 + window - 1, and the last one is at 99.
    model = tiny("mistral-sliding", sliding_window=window)
    found = bands.examine(model, random_ids(N)[0], windows_of(model))
    assert found.agrees is agrees
    assert "really see" not in found.sentence


@pytest.mark.parametrize(
    ("family", "changes", "written", "expected"),
    [
        ("llama", {}, {}, "declares no window: all 4 layers see all of the past"),
        (
            "llama",
            {},
            {"sliding_window": 16},
            "sliding_window is 16 in the config, but no layer uses it (the family takes no notice)",
        ),
        (
            "qwen2",
            {"use_sliding_window": False, "sliding_window": 16},
            {"use_sliding_window": False, "sliding_window": 16},
            "no layer uses it (use_sliding_window is false)",
        ),
        ("gemma3", {}, {}, "2 of 4 layers have a window of 12"),
        ("mistral-sliding", {}, {}, "FlashAttention calls it (11, 0), FlashInfer window_left=11"),
        ("mistral-sliding", {"sliding_window": 200}, {}, "can't be checked within 100 tokens"),
    ],
)
def test_what_configs_declare(family, changes, written, expected):
    model = tiny(family, **changes)
    assert expected in bands.examine(model, random_ids(N)[0], windows_of(model), written).sentence
