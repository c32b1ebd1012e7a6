import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from attnspan.patterns import (
    Blockwise,
    Causal,
    Documents,
    Full,
    GlobalTokens,
    Longformer,
    Pattern,
    Sinks,
    SlidingWindow,
    Strided,
    parse,
)
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
    for w, d, right in ((3, 2, 0), (2, 3, 2), (1, 4, 1)):
        assert pairs(SlidingWindow(w, dilation=d, right=right)) == {
            (i, i - d * step)
            for i in range(N)
            for step in range(-right, w)
            if 0 <= i - d * step < N
        }
    assert pairs(SlidingWindow(2, include_self=False, dilation=3)) == {
        (i, i - 3 * step) for i in range(N) for step in (1, 2) if i - 3 * step >= 0
    }
    assert pairs(Strided(2, 3)) == {
        (i, j) for i in range(N) for j in range(i + 1) if i - j < 2 or (i - j) % 3 == 0
    }
    blocks = {(i, j) for i in range(N) for j in range(N) if i // 4 == j // 4}
    before = {(i, j) for i in range(N) for j in range(N) if i // 4 - j // 4 == 1}
    causal = pairs(Causal())
    assert pairs(Blockwise(4, causal=False)) == blocks
    assert pairs(Blockwise(4)) == blocks & causal
    assert pairs(Blockwise(4, before=True)) == (blocks | before) & causal
    globals_ = {(i, j) for i in range(N) for j in range(N) if i in (2, 5) or j in (2, 5)}
    assert pairs(GlobalTokens((2, 5), causal=False)) == globals_
    assert pairs(GlobalTokens((2, 5))) == globals_ & causal
    assert pairs(GlobalTokens(2)) == {(i, j) for i, j in causal if i < 2 or j < 2}
    assert pairs(Longformer(3, (2, 5))) == pairs(SlidingWindow(3)) | (globals_ & causal)
    assert pairs(Longformer(3, (2, 5), right=1)) == pairs(SlidingWindow(3, right=1)) | globals_
    document = (0, 0, 0, 1, 2, 2, 2)  # and two tokens past the last
    together = {(i, j) for i in range(7) for j in range(7) if document[i] == document[j]}
    assert pairs(Documents((3, 1, 3), causal=False)) == together
    assert pairs(Documents((3, 1, 3))) == together & causal
    assert pairs(Sinks(0)) == pairs(GlobalTokens(0)) == pairs(GlobalTokens(())) == set()
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


@given(patterns())
@settings(deadline=None, max_examples=100)
def test_printed_pattern_makes_the_same_pattern(pattern: Pattern) -> None:
    again = parse(repr(pattern))
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(4, dilation=0), "SlidingWindow: dilation is 0; a whole number of"),
        (lambda: SlidingWindow(4, right=-1), "SlidingWindow: right is -1; a whole number of"),
        (lambda: SlidingWindow(4, False, right=1), "right is 1 with include_self=False; 0 is"),
        (lambda: Strided(4, 0), "Strided: stride is 0; a whole number of at least 1 is allowed"),
        (lambda: Blockwise(0), "Blockwise: block is 0; a whole number of at least 1"),
        (lambda: GlobalTokens(-1), "GlobalTokens: tokens is -1; a whole number of at least 0"),
        (lambda: GlobalTokens((3, 2)), r"tokens is \(3, 2\); positions in rising order"),
        (lambda: GlobalTokens((1, 1)), r"tokens is \(1, 1\); positions in rising order"),
        (lambda: GlobalTokens((1.0,)), "a position in tokens is 1.0; a whole number"),
        (lambda: Longformer(4, [1]), r"Longformer: global_tokens is \[1\]; a whole number"),
        (lambda: Documents(()), r"Documents: lengths is \(\); a tuple of at least one length"),
        (lambda: Documents([3]), r"Documents: lengths is \[3\]; a tuple"),
        (lambda: SlidingWindow(2**63 - 1), "window is 9223372036854775807; a whole number up to"),
        (lambda: SlidingWindow(2**30, dilation=2**30), "window times dilation is"),
        (lambda: Documents((3, 0)), "Documents: a length is 0; a whole number of at least 1"),
    ],
)
def test_options_are_refused_in_one_sentence(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Window(4)", r"has 'Window\(4\)' in it; allowed are Blockwise, Causal"),
        ("SlidingWindow(4", "is no expression; allowed are"),
        ("SlidingWindow(4) ^ Sinks(4)", r"has 'SlidingWindow\(4\) \^ Sinks\(4\)' in it"),
        ("SlidingWindow(n)", "has the argument 'n'; numbers, True, False and tuples"),
        ("SlidingWindow(0)", "SlidingWindow: window is 0; a whole number"),
        ("SlidingWindow()", "missing 1 required positional argument"),
        ("SlidingWindow(4, colour=3)", "unexpected keyword argument 'colour'"),
        ("__import__('os').system('true')", "in it; allowed are"),
        ("", "is no expression"),
    ],
)
def test_bad_texts_are_refused_in_one_sentence(text, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_other_misuse_is_refused() -> None:
    with pytest.raises(TypeError, match="include_self is 1; True or False is allowed"):
        SlidingWindow(4, include_self=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unsupported operand"):
        Causal() & 4  # type: ignore[operator]


def test_patterns_load_no_torch() -> None:
    code = "import sys, attnspan.patterns; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int16", "uint32", "uint64"])
@pytest.mark.parametrize("pattern", [Causal(), SlidingWindow(300), Sinks(2) | SlidingWindow(9)])
def test_narrow_and_unsigned_positions_do_not_wrap_around(pattern, kind) -> None:
    wide = np.arange(120)
    narrow = wide.astype(kind)
    expected = pattern.sees(wide[:, None], wide)
    assert np.array_equal(pattern.sees(narrow[:, None], narrow), expected)
    if kind in ("uint8", "int8", "int16"):
        x = torch.from_numpy(narrow)
        assert np.array_equal(pattern.sees(x[:, None], x).numpy(), expected)
