"""Sums are those of all tokens at once; blocks and series stay bounded."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.evaluation import score as module
from attnspan.evaluation.score import MOST_BLOCKS, MOST_POINTS, Score, token_nll

tokens = st.lists(st.tuples(st.floats(0, 50), st.integers(0, 9)), min_size=1, max_size=400)


def filled(pairs, chunk):
    score = Score()
    for first in range(0, len(pairs), chunk):
        part = pairs[first : first + chunk]
        score.add([nll for nll, _ in part], [width for _, width in part], 100 + first, first)
    return score


@settings(deadline=None, max_examples=80)
@given(pairs=tokens, chunk=st.integers(1, 60))
def test_sums_whatever_the_chunks(pairs, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_BLOCKS", 16)
        patch.setattr(module, "MOST_POINTS", 5)
        score = filled(pairs, chunk)
        series = score.series()
    total = score.total
    assert total.tokens == len(pairs)
    assert total.nll == pytest.approx(math.fsum(nll for nll, _ in pairs), rel=1e-12)
    assert total.bytes == sum(width for _, width in pairs)
    assert len(score._blocks) <= 16
    # The last quarter: some block's start at or after it, to the end, off by one block at most.
    quarter = score.last_quarter()
    rest = pairs[len(pairs) - quarter.tokens :]
    assert quarter.nll == pytest.approx(math.fsum(nll for nll, _ in rest), rel=1e-12)
    assert quarter.bytes == sum(width for _, width in rest)
    assert len(pairs) / 4 - score._size < quarter.tokens <= max(1, len(pairs) / 4)
    # The series adds up to the total.
    assert len(series) <= 5
    assert [p.tokens for p in series] == sorted({p.tokens for p in series})
    counts = [b.tokens - a for a, b in zip([0, *(p.tokens for p in series)], series, strict=False)]
    summed = math.fsum(p.nll * n for p, n in zip(series, counts, strict=True))
    assert summed == pytest.approx(total.nll, rel=1e-12)
    last = (len(pairs) - 1) // chunk * chunk
    assert (series[-1].cache_bytes, series[-1].tokens_held) == (100 + last, last)


def test_a_long_stream_takes_bounded_memory():
    score = Score()
    for _ in range(2000):
        score.add([1.0] * 97, [1] * 97, 5, 7)
    assert score.total.mean == 1.0
    assert MOST_BLOCKS / 2 <= len(score._blocks) <= MOST_BLOCKS
    assert MOST_POINTS / 2 <= len(score.series()) <= MOST_POINTS
    assert score.last_quarter().tokens == pytest.approx(2000 * 97 / 4, rel=4 / MOST_BLOCKS)
    assert len(json.dumps(score.state())) < 40_000


@settings(deadline=None, max_examples=30)
@given(pairs=tokens, split=st.integers(0, 400))
def test_state_goes_through_json_bit_for_bit(pairs, split):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_BLOCKS", 16)
        whole = filled(pairs, 1)
        part = Score.from_state(json.loads(json.dumps(filled(pairs[:split], 1).state())))
        for i, (nll, width) in enumerate(pairs[split:], split):
            part.add([nll], [width], 100 + i, i)
    assert part.state() == whole.state()


def test_a_broken_model_is_named():
    score = Score()
    score.add([1.0, 2.0], [1, 1], 0, 0)
    with pytest.raises(ArithmeticError, match="the nll of token 4 is nan"):
        score.add([1.0, math.nan], [1, 1], 0, 0)


def test_figures():
    score = Score()
    score.add([math.log(2), math.log(8)], [1, 3], 0, 0)
    figures = score.total.figures()
    assert figures["perplexity"] == pytest.approx(4)
    assert figures["bits_per_byte"] == pytest.approx(1)
    score = Score()
    score.add([2000.0], [0], 0, 0)
    assert math.isfinite(score.total.perplexity)
    assert score.total.bits_per_byte is None


def test_token_nll_is_a_float64_computation():
    torch.manual_seed(0)
    logits = torch.randn(150, 37) * 8
    targets = torch.randint(0, 37, (150,))
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    # float64 throughout: a few roundings of numbers below 64, 64 * 2^-53 each.
    torch.testing.assert_close(
        torch.tensor(token_nll(logits, targets), dtype=torch.float64), expected, rtol=0, atol=5e-14
    )
