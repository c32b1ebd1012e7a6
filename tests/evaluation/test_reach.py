"""Measured reach: what it means, and that it is exactly zero where no path leads."""

import math

import pytest
import torch
from tiny import COMMON, random_ids, rounded, tiny
from transformers import MixtralConfig, MixtralForCausalLM

import attnspan as span
from attnspan.evaluation import reach
from attnspan.evaluation.influence import held
from attnspan.evaluation.reach import changed, gradient, measure
from attnspan.models import attach
from attnspan.planner.reach import bound

IDS = random_ids(96, 2)
FOUR_OF_12 = 44  # 4 layers, each 11 tokens on


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", attn_implementation="sdpa")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["mistral-sliding", "gemma3", "cohere2"])
def test_zero_beyond_the_bound_under_the_models_own_windows(family, implementation):
    changes = {"attn_implementation": implementation}
    if family != "mistral-sliding":
        changes["layer_types"] = ["sliding_attention"] * 4
    model = tiny(family, **changes)
    assert bound([12] * 4) == FOUR_OF_12
    found = measure(model, IDS, bound=FOUR_OF_12, places=4, replaced=4)
    for influence in (found.gradients, found.changes):
        assert influence.beyond == 0.0
        assert influence.beyond_pairs > 50
        assert influence.mean[FOUR_OF_12] > 0  # the bound is tight
        assert not any(influence.mean[FOUR_OF_12 + 1 :])
    # One less is too little, for both measures alike: what is asserted can fail.
    with pytest.raises(ArithmeticError, match=r"gradients beyond .* 43 .*; changes beyond .* 43"):
        measure(model, IDS, bound=FOUR_OF_12 - 1, places=4, replaced=4)


def test_a_window_one_larger_is_caught(llama):
    with attach(llama, span.SlidingWindow(12)):
        assert measure(llama, IDS, bound=FOUR_OF_12, places=4, replaced=4).defects == ()
    with attach(llama, span.SlidingWindow(13)):
        found = measure(llama, IDS, bound=FOUR_OF_12, places=4, replaced=4, strict=False)
    assert len(found.defects) == 2
    assert found.gradients.beyond > 0
    assert found.changes.beyond > 0


def test_mixed_windows(llama):
    windows = (5, 9, 3, 12)
    with attach(llama, [span.SlidingWindow(w) for w in windows]):
        found = measure(llama, IDS, bound=bound(windows), places=4, replaced=4)
    assert found.bound == 4 + 8 + 2 + 11
    assert found.gradients.mean[25] > 0
    assert found.gradients.mean[26] == 0 == found.gradients.beyond
    # One layer of the four a token wider.
    with (
        attach(llama, [span.SlidingWindow(w) for w in (5, 9, 4, 12)]),
        pytest.raises(ArithmeticError, match="beyond the bound of 25"),
    ):
        measure(llama, IDS, bound=bound(windows), places=4, replaced=4)


def test_one_full_layer_reaches_everywhere():
    model = tiny("gemma3", attn_implementation="sdpa")
    found = measure(model, IDS, places=4, replaced=4)
    assert found.bound is None is found.gradients.beyond
    assert found.gradients.mean[60] > 0
    assert found.changes.mean[60] > 0
    assert measure(model, IDS, bound=FOUR_OF_12, places=4, replaced=4, strict=False).defects


def test_sinks_are_unbounded_and_nothing_else_is(llama):
    with attach(llama, span.SlidingWindow(12) | span.Sinks(4)):
        found = measure(llama, IDS, bound=FOUR_OF_12, sinks=4, places=4, replaced=4)
        assert found.gradients.beyond == 0.0 == found.changes.beyond
        assert found.gradients.first > 0.05  # of influence that is more than 44 tokens away
        with pytest.raises(ArithmeticError, match="gradients beyond"):
            measure(llama, IDS, bound=FOUR_OF_12, sinks=3, places=4, replaced=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_zero_in_other_precisions(dtype):
    model = rounded(tiny("mistral-sliding", attn_implementation="sdpa"), dtype)
    found = measure(model, IDS, bound=FOUR_OF_12, places=4, replaced=4)
    assert found.gradients.beyond == 0.0 == found.changes.beyond
    assert found.gradients.mean[40] > 0


def test_experts_may_round_where_nothing_reaches():
    """An expert's product has a row for each token that chose it, so others' last bits move."""
    torch.manual_seed(0)
    sizes = {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12}
    model = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    found = measure(model, IDS, bound=FOUR_OF_12, places=4, replaced=8, rounding=1e-9)
    assert found.gradients.beyond == 0.0
    assert found.changes.beyond <= 1e-9 < found.changes.mean[0]
    with pytest.raises(ArithmeticError, match="gradients beyond the bound of 33"):
        measure(model, IDS, bound=33, places=4, replaced=8, rounding=1e-9)


def test_gradients_are_those_of_differences():
    model = tiny("llama").double()
    ids, place = IDS[0, :24], 15
    norms = gradient(model, ids, place)
    embeddings = model.get_input_embeddings()(ids[None]).detach()

    def chosen(moved):
        with torch.no_grad():
            logits = model(inputs_embeds=moved, use_cache=False).logits
        return float(logits[0, place].log_softmax(-1)[ids[place + 1]])

    for j in (0, 7, 15):
        by_hand = []
        for channel in range(embeddings.shape[-1]):
            step = torch.zeros_like(embeddings)
            step[0, j, channel] = 1e-3
            by_hand.append((chosen(embeddings + step) - chosen(embeddings - step)) / 2e-3)
        # transformers' norms round to float32, 6e-8, which over 2e-3 is 3e-5 a channel; the third
        # derivative adds about 1e-6.
        expected = math.sqrt(math.fsum(x * x for x in by_hand))
        assert float(norms[j]) == pytest.approx(expected, rel=1e-3)
    assert not norms[place + 1 :].any()


def test_changes_are_the_divergence_of_two_forwards():
    model = tiny("llama")
    ids = IDS[0, :40]
    others = [(5, 9), (20, 33), (39, 7)]
    for place, values in changed(model, ids, others):
        other = ids.clone()
        other[place] = dict(others)[place]
        with torch.no_grad():
            a, b = (
                model(input_ids=x[None]).logits[0, place:].double().log_softmax(-1)
                for x in (ids, other)
            )
        expected = (a.exp() * (a - b)).sum(-1)
        # Logits of one row and of a batch differ in their last bits.
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-6)
        assert (values >= 0).all()


def test_batches_don_t_change_the_figures(llama, monkeypatch):
    whole = measure(llama, IDS, places=5, replaced=5)
    monkeypatch.setattr(reach, "_CPU_TOKENS", 96)
    single = measure(llama, IDS, places=5, replaced=5)
    assert single.changes.mean == pytest.approx(whole.changes.mean, rel=1e-2, abs=1e-7)


def test_the_bound_is_one_function():
    assert reach.bound is bound
    with pytest.raises(AttributeError, match="no attribute 'limit'"):
        _ = reach.limit


def test_held_and_its_share():
    assert held(torch.tensor([0.0, 0.0, 1.0])) == (2, 2, 2)
    assert held(torch.full((100,), 0.01)) == (49, 89, 98)
    assert held(torch.zeros(3)) == (0, 0, 0)


def test_the_curve_in_json_holds_all_of_the_influence(llama):
    found = measure(llama, IDS, places=3, replaced=3)
    each = found.as_dict()["gradients"]
    binned = sum(b["mean"] * b["pairs"] for b in each["curve"] if b["pairs"])
    g = found.gradients
    assert binned == pytest.approx(sum(m * p for m, p in zip(g.mean, g.pairs, strict=True)))
    assert [b["from"] for b in each["curve"][1:]] == [b["to"] + 1 for b in each["curve"][:-1]]


def test_what_is_refused(llama):
    with pytest.raises(ValueError, match=r"ids is \(96,\)"):
        measure(llama, IDS[0])
    with pytest.raises(ValueError, match="length of at least 8"):
        measure(llama, IDS[:, :7])
    with pytest.raises(ValueError, match="places is 0"):
        measure(llama, IDS, places=0)
    with pytest.raises(ValueError, match="replaced is True"):
        measure(llama, IDS, replaced=True)
    with pytest.raises(ValueError, match="sinks is 5"):
        measure(llama, IDS, sinks=5)
    with pytest.raises(ValueError, match="one kind of token alone"):
        measure(llama, torch.full((1, 20), 3), places=1, replaced=1)
    llama.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            measure(llama, IDS)
    finally:
        llama.eval()


def test_a_model_that_looks_ahead_is_refused(llama):
    with (
        attach(llama, span.SlidingWindow(12, right=1)),
        pytest.raises(ArithmeticError, match="isn't causal"),
    ):
        measure(llama, IDS, places=2, replaced=2)


def test_weights_keep_their_gradients(llama):
    first = next(llama.parameters())
    first.requires_grad_(False)
    measure(llama, IDS[:1], places=1, replaced=1)
    assert [p.requires_grad for p in llama.parameters()].count(False) == 1
    assert all(p.grad is None for p in llama.parameters())
    first.requires_grad_(True)
