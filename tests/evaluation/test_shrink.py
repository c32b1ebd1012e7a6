"""Losses of smaller caches, the best beside them, and which layers need all."""

import io
import math

import pytest
import torch
from tiny import random_ids, tiny, tiny_llama
from transformers import AutoTokenizer

from attnspan.evaluation import layers, shrink
from attnspan.evaluation.intervals import Paired
from attnspan.evaluation.shrink import Ledger, Passage, best, perplexity, streamed
from attnspan.models import attach, bundled
from attnspan.policies import KeepAll, PerLayer, SinkWindow, Window

IDS = (1, *random_ids(120)[0].tolist())


def nll(model, context, target):
    with torch.no_grad():
        logits = model(torch.tensor([context]), use_cache=False).logits[0, -1].double()
    return float(-logits.log_softmax(-1)[target])


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [16, 18, 32])
@pytest.mark.parametrize("scored", [1, 3, 40])
def test_the_best_is_a_fresh_forward_of_at_least_three_quarters(bos, length, scored):
    model = tiny("llama")
    passage = Passage("text", IDS[: length + scored], length, bos)
    (got,) = best(model, [passage])
    assert len(got) == scored == passage.scored
    stride = length // 4
    for i, value in enumerate(got):
        t = length + i
        # The forward ends with its piece: `stride` tokens on, or the text's end.
        stop = min(length + (i // stride + 1) * stride, len(passage.ids))
        body = passage.ids[stop - length : t] if bos else passage.ids[stop - 1 - length : t]
        context = [IDS[0], *body] if bos else list(body)
        assert 3 * length / 4 <= len(context) <= length
        assert value == pytest.approx(nll(model, context, passage.ids[t]), abs=4e-5)
    # The oracle can fail: a context one token short.
    context = [IDS[0], *passage.ids[2 - bos + 1 : length]]
    assert abs(got[0] - nll(model, context, passage.ids[length])) > 1e-4


def test_a_stream_scores_the_same_tokens():
    model = tiny("llama")
    passages = [Passage("a", IDS[:60], 32, True), Passage("b", IDS[20:90], 32, False)]
    told = []
    with attach(model):
        got = streamed(model, KeepAll(), passages, lambda: told.append(1))
    assert len(told) == shrink.steps(passages)
    for passage, nlls in zip(passages, got, strict=True):
        expected = [
            nll(model, list(passage.ids[:t]), passage.ids[t])
            for t in range(passage.length, len(passage.ids))
        ]
        assert nlls == pytest.approx(expected, abs=4e-5)


def test_a_ledger_measures_once(monkeypatch):
    model = tiny("llama")
    ledger = Ledger(model, [Passage("a", IDS[:60], 32, True)])
    first = ledger.nlls(Window(8))
    monkeypatch.setattr(shrink, "streamed", None)
    assert ledger.nlls(Window(8)) is first
    row = ledger.row(Window(8))
    assert row["policy"] == "window:8"
    assert row["texts"][0]["perplexity"] == pytest.approx(perplexity(first[0]))
    assert ledger.against(Window(8), Window(8))[0].ratio == 1.0


@pytest.mark.parametrize("bos", [True, False])
def test_halves_are_of_what_was_measured(bos):
    """Each half's figures, taken over or measured anew, are those of a ledger of that half."""
    model = tiny("llama")
    passages = [Passage("a", IDS[:60], 32, bos), Passage("b", IDS[20:95], 32, bos)]
    ledger = Ledger(model, passages)
    ledger.nlls(Window(8))
    first, second = ledger.halves()
    assert [each.scored for each in first.passages] == [14, 21]
    assert [each.scored for each in second.passages] == [14, 22]
    for policy in (Window(8), SinkWindow(2, 6)):
        whole = ledger.nlls(policy)
        for i, half in enumerate((14, 21)):
            assert first.nlls(policy)[i] == pytest.approx(whole[i][:half], abs=4e-5)
            assert second.nlls(policy)[i] == pytest.approx(whole[i][half:], abs=4e-5)
    for i, half in enumerate((14, 21)):
        assert [*first.best[i], *second.best[i]] == ledger.best[i]
        assert len(first.best[i]) == half
    # The first half feeds nothing of the second, so it can't have seen it.
    assert all(
        early.ids == whole.ids[: early.length + early.scored]
        for early, whole in zip(first.passages, passages, strict=True)
    )


def test_frequencies_are_the_best_blind_guess():
    passage = Passage("a", (9, 9, 1, 1, 1, 2), 2, False)
    (got,) = shrink.frequency_nll([passage])
    assert got == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_reading_takes_bos_and_no_more_than_asked():
    tokenizer = AutoTokenizer.from_pretrained(bundled.path())
    assert shrink.read(io.BytesIO(b"abcdef"), tokenizer, "t", 256, 4) == (256, 97, 98, 99)
    assert shrink.read(io.BytesIO(b"ab"), tokenizer, "t", None, 9) == (97, 98)


class Scripted:
    """A ledger whose losses are sums of what each small layer costs, and more for some pairs."""

    def __init__(self, costs, pairs=()):
        self.costs, self.pairs = costs, pairs
        self.asked = set()

    def _loss(self, policy):
        self.asked.add(policy)
        each = policy.policies if isinstance(policy, PerLayer) else (policy,) * len(self.costs)
        small = {i for i, one in enumerate(each) if one == SMALL}
        total = sum(self.costs[i] for i in small)
        return total + sum(cost for pair, cost in self.pairs if set(pair) <= small)

    def against_best(self, policy):
        ratio = 1 + self._loss(policy)
        return [Paired(ratio, ratio - 0.001, ratio + 0.001)]

    def against(self, policy, base):
        ratio = (1 + self._loss(policy)) / (1 + self._loss(base))
        return [Paired(ratio, ratio, ratio)]


LARGE, SMALL = Window(64), Window(8)


@pytest.mark.parametrize(
    ("costs", "windows", "full"),
    [
        ([0.001, 0.05, 0.001, 0.03], None, [1, 3]),
        ([0.0, 0.0, 0.0], None, []),
        # Within 2 % itself, but not the whole interval.
        ([0.0195, 0.0], None, [0]),
        ([0.05, 0.05], None, [0, 1]),
        ([0.008] * 5, None, [2, 3, 4]),
        # Sliding layers keep their own window, and are neither tried nor full.
        ([0.0, 0.05, 0.0, 0.001], [8, None, 8, None], [1]),
    ],
)
def test_the_search_finds_the_layers_that_cost(costs, windows, full):
    ledger = Scripted(costs)
    found = layers.search(ledger, windows or [None] * len(costs), LARGE, SMALL, 1.02)
    assert found.full_layers(found.chosen) == full
    assert found.chosen in dict(found.tried)  # what is reported was measured
    assert found.kept is None  # nothing is shown before other tokens were asked
    allowed = [i for i, _ in enumerate(costs) if not windows or windows[i] is None]
    assert sorted(layer for group in found.groups for layer in group) == allowed
    for some, pairs in found.tried:
        policy = found.policy(some)
        assert policy in ledger.asked
        assert pairs[0].ratio == pytest.approx(ledger.against_best(policy)[0].ratio)


def test_losses_that_add_up_are_measured_together():
    """Each of these is cheap alone; two of them together are not."""
    ledger = Scripted([0.001] * 4, pairs=[((0, 1), 0.5)])
    found = layers.search(ledger, [None] * 4, LARGE, SMALL, 1.02)
    assert not {0, 1} <= set(range(4)) - set(found.full_layers(found.chosen))


def test_nothing_is_chosen_where_all_layers_full_are_too_much():
    class Poor(Scripted):
        def _loss(self, policy):
            return 0.1 + super()._loss(policy)

    found = layers.search(Poor([0.0] * 3), [None] * 3, LARGE, SMALL, 1.02)
    assert found.chosen is None
    assert found.as_dict()["full_layers"] is None is found.as_dict()["chosen"]
    assert layers.confirm(found, Scripted([0.0] * 3), 1.02).kept is None


@pytest.mark.parametrize(
    ("costs", "full", "asked"),
    [
        ([0.001] * 4 + [0.5], [4], 4),  # the same on both halves
        ([0.001, 0.001, 0.05, 0.001, 0.5], [2, 3, 4], 3),  # layer 2 costs more on the second
        ([0.05, 0.001, 0.001, 0.001, 0.5], [0, 1, 2, 3, 4], 2),
    ],
)
def test_what_was_chosen_is_held_against_other_tokens(costs, full, asked):
    """From the set that drops least on; where one fails, what was asked before it is kept."""
    found = layers.search(Scripted([0.001] * 4 + [0.5]), [None] * 5, LARGE, SMALL, 1.02)
    assert found.full_layers(found.chosen) == [4]
    assert sorted(len(some) for some, _ in found.tried) == [0, 2, 3, 4, 5]
    other = Scripted(costs)
    held = layers.confirm(found, other, 1.02)
    assert held.as_dict()["full_layers"] == full
    assert held.as_dict()["chosen"] == [4]
    assert len(other.asked) == len(held.second) == asked


def test_deep_models_are_grouped():
    groups = layers.grouped(list(range(80)))
    assert len(groups) == layers.MOST_GROUPS
    assert [layer for group in groups for layer in group] == list(range(80))
    assert {len(group) for group in groups} == {6, 7}
    ledger = Scripted([0.0] * 79 + [0.5])
    found = layers.search(ledger, [None] * 80, LARGE, SMALL, 1.02)
    assert found.full_layers(found.chosen) == list(groups[-1])
    assert len(ledger.asked) <= layers.MOST_GROUPS + 6


def test_the_search_on_a_real_model():
    """Random weights: that policies reach the cache, and figures are those of the ledger."""
    model = tiny_llama(num_hidden_layers=3)
    ledger = Ledger(model, [Passage("a", IDS[:100], 48, True)])
    large, small = SinkWindow(2, 46), SinkWindow(2, 6)
    found = layers.search(ledger, [None] * 3, large, small, math.inf)
    assert found.full_layers(found.chosen) == []
    assert found.tried[1][1][0] == ledger.against_best(small)[0]
    one = PerLayer((small, large, large))
    assert found.alone[0][0] == ledger.against(one, large)[0]
