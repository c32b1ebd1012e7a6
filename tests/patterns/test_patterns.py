import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.patterns import And, Causal, Full, Not, Or, Pattern, Sinks, SlidingWindow
from attnspan.testing import patterns

N = 9


def pairs(pattern: Pattern, n: int = N) -> set[tuple[int, int]]:
    return {(i, j) for i in range(n) for j in range(n) if pattern.sees(i, j)}


def test_named_patterns_see_what_their_definitions_say() -> None:
    assert pairs(Full()) == {(i, j) for i in range(N) for j in range(N)}
    assert pairs(Causal()) == {(i, j) for i in range(N) for j in range(i + 1)}
    for w in (1, 3, N, 2 * N):
        assert pairs(SlidingWindow(w)) == {
            (i, j) for i in range(N) for j in range(max(0, i - w + 1), i + 1)
        }
        # The article's slice, K[max(0, i-W):i].
        assert pairs(SlidingWindow(w, include_self=False)) == {
            (i, j) for i in range(N) for j in list(range(N))[max(0, i - w) : i]
        }
    assert pairs(Sinks(0)) == set()
    assert pairs(Sinks(3)) == {(i, j) for i in range(N) for j in range(min(3, i + 1))}


def test_streaming_llm_pattern_sees_sinks_and_window() -> None:
    pattern = SlidingWindow(3) | Sinks(2)
    assert [sum(pattern.sees(i, j) for j in range(i + 1)) for i in range(8)] == [
        1, 2, 3, 4, 5, 5, 5, 5
    ]  # fmt: skip


@given(patterns(), patterns())
@settings(deadline=None, max_examples=60)
def test_algebra_is_that_of_sets(a: Pattern, b: Pattern) -> None:
    everything = pairs(Full())
    assert pairs(a & b) == pairs(a) & pairs(b)
    assert pairs(a | b) == pairs(a) | pairs(b)
    assert pairs(~a) == everything - pairs(a)


@given(patterns())
@settings(deadline=None, max_examples=100)
def test_numbers_numpy_and_torch_agree(pattern: Pattern) -> None:
    i, j = np.arange(N)[:, None], np.arange(N)
    seen = pattern.sees(i, j)
    assert seen.dtype == np.bool_
    assert seen.shape == (N, N)
    for dtype in (torch.int32, torch.int64):
        tensor = pattern.sees(torch.arange(N, dtype=dtype)[:, None], torch.arange(N, dtype=dtype))
        assert tensor.dtype == torch.bool
        assert np.array_equal(tensor.numpy(), seen)
    assert {(int(a), int(b)) for a, b in zip(*seen.nonzero(), strict=True)} == pairs(pattern)
    assert isinstance(pattern.sees(0, 0), bool)


def check_cover(pattern: Pattern, queries: range, keys: range) -> None:
    seen = {bool(pattern.sees(i, j)) for i in queries for j in keys}
    cover = pattern.cover(queries, keys)
    if cover != "partial":
        assert seen == {cover == "full"}
    elif not isinstance(pattern, And | Or | Not):
        assert seen == {True, False}


@given(patterns(), st.integers(-3, N), st.integers(1, 6), st.integers(0, N), st.integers(1, 6))
@settings(deadline=None, max_examples=300)
def test_cover_holds_for_every_pair(
    pattern: Pattern, first: int, n: int, start: int, m: int
) -> None:
    check_cover(pattern, range(first, first + n), range(start, start + m))


def test_a_cover_that_is_off_by_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SlidingWindow.cover
    check_cover(SlidingWindow(3), range(3, 4), range(4))
    monkeypatch.setattr(
        SlidingWindow, "cover", lambda self, q, k: right(SlidingWindow(self.window + 1), q, k)
    )
    with pytest.raises(AssertionError):
        check_cover(SlidingWindow(3), range(3, 4), range(4))


@given(patterns())
@settings(deadline=None, max_examples=100)
def test_printed_pattern_makes_the_same_pattern(pattern: Pattern) -> None:
    again = eval(repr(pattern))
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert str(again) == repr(pattern)


def test_patterns_print_as_expressions() -> None:
    a, b = SlidingWindow(4096), Sinks(4)
    assert str(a | b) == "SlidingWindow(4096) | Sinks(4)"
    assert str(~(a | b) & Causal()) == "~(SlidingWindow(4096) | Sinks(4)) & Causal()"
    assert str(a & (b | Full())) == "SlidingWindow(4096) & (Sinks(4) | Full())"
    assert str(SlidingWindow(2, include_self=False)) == "SlidingWindow(2, include_self=False)"
    assert a != SlidingWindow(4096, include_self=False)
    assert len({a, SlidingWindow(4096), b, Sinks(4)}) == 2


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4", None])
def test_bad_sizes_are_refused_in_one_sentence(size: object) -> None:
    with pytest.raises(ValueError, match=r"^SlidingWindow: window is .*; a whole number of at"):
        SlidingWindow(size)  # type: ignore[arg-type]
    if size != 0:
        with pytest.raises(ValueError, match=r"^Sinks: sinks is .* at least 0 is allowed$"):
            Sinks(size)  # type: ignore[arg-type]


def test_other_misuse_is_refused() -> None:
    with pytest.raises(TypeError, match="include_self is 1; True or False is allowed"):
        SlidingWindow(4, include_self=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unsupported operand"):
        Causal() & 4  # type: ignore[operator]


def test_patterns_load_no_torch() -> None:
    code = "import sys, attnspan.patterns; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"]
