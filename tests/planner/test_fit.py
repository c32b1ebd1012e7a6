"""What fits: the longest context to the token, and the least change."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.planner.fit import CHUNK, Candidate, cheapest, longest, table
from attnspan.planner.plan import plan
from attnspan.planner.quantities import MOST_TOKENS


def test_longest_by_hand() -> None:
    """Mistral 7B v0.3 in 24 GiB: a token costs its keys and values, and its row of the residual
    stream, its norm and the two halves of the feed-forward, all in bf16."""
    found = longest("mistral-7b-v0.3", memory="24GiB")
    weights = 2 * 7_248_023_552
    token = 131_072 + 2 * (2 * 4096 + 2 * 14_336)
    assert found.context == (24 * 2**30 - weights) // token
    assert found.plan is not None
    assert found.beyond is not None
    assert found.plan.total == weights + found.context * token
    assert f"{found.context:,} tokens" in str(found)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["mistral-7b", "llama-3-8b", "gemma-3-12b", "gpt-oss-20b", "deepseek-v3"]),
    st.integers(1, 1500),
    st.sampled_from(
        [
            {},
            {"batch": 3},
            {"chunk": 512},
            {"engine": "vllm"},
            {"engine": "transformers"},
            {"engine": "transformers", "chunk": 512},
            {"weights": "int4"},
            {"policy": "window:900"},
            {"pattern": "Blockwise(900)"},
        ]
    ),
)
def test_one_token_more_does_not_fit(name: str, gib: int, how: dict[str, Any]) -> None:
    found = longest(name, memory=gib * 2**30, **how)
    if found.plan is None:
        assert not plan(name, 1, memory=gib * 2**30, **how).fits
        return
    assert found.plan.fits
    assert plan(name, found.context, memory=gib * 2**30, **how).total == found.plan.total
    for shorter in (1, found.context // 3 + 1, max(1, found.context - 1)):
        assert plan(name, shorter, memory=gib * 2**30, **how).fits
    if found.beyond is None:
        assert found.context == MOST_TOKENS
    else:
        assert found.beyond.context == found.context + 1
        assert not plan(name, found.context + 1, memory=gib * 2**30, **how).fits


@pytest.mark.parametrize("chunk", [512, None])
@pytest.mark.parametrize("name", ["mistral-7b", "gpt-oss-20b"])
def test_a_longer_context_never_takes_less_of_transformers(name: str, chunk: int | None) -> None:
    # Where a last call of one token follows whole ones, slices of the call before live on.
    lengths = [*range(500, 530), *range(4090, 4105), 4607, 4608, 4609, 5000, 8192, 8193]
    taken = [plan(name, n, engine="transformers", chunk=chunk).total for n in lengths]
    assert taken == sorted(taken)


def test_a_bounded_cache_and_steps_fit_any_context() -> None:
    found = longest("mistral-7b", memory="24GiB", chunk=512)
    assert found.beyond is None
    assert "Any context fits" in str(found)
    none = longest("llama-3-70b", memory="24GiB")
    assert none.context == 0
    assert "Nothing fits 24.00 GiB: one token takes 131." in str(none)


def names(found: tuple[Candidate, ...]) -> list[str]:
    return [each.change for each in found]


def test_changes_come_in_the_order_of_what_they_lose() -> None:
    found = cheapest("llama-3-70b", 131_072)
    assert [name.split(", sinks")[0] for name in names(found)] == [
        "as asked",
        "prefill in steps of 2,048",
        "int8 cache, bf16 weights",
        "int8 cache, int8 weights",
        "int4 cache, int8 weights",
        "int4 cache, int4 weights",
        "dense cache, bf16 weights",
        "int8 cache, bf16 weights",
        "int8 cache, int8 weights",
        "int4 cache, int8 weights",
    ]
    fits = [each.fits for each in found]
    assert fits == [False] * 5 + [True] + [False] * 2 + [True] * 2
    assert "the least change that fits is int4 cache, int4 weights" in table(found)
    totals = [each.plan.total for each in found[:6] if each.plan is not None]
    assert totals == sorted(totals, reverse=True)
    # The window is the largest that fits.
    widest = found[8].plan
    assert widest is not None
    policy = widest.policy
    wider = plan(
        "llama-3-70b",
        131_072,
        storage="int8",
        weights="int8",
        chunk=CHUNK,
        policy=type(policy)(4, policy.window + 1),  # pyright: ignore
    )
    assert widest.fits
    assert not wider.fits


def test_what_fits_as_asked_stays() -> None:
    found = cheapest("llama-3-8b", 8192)
    assert found[0].fits
    assert "8,192 tokens in 74.51 GiB: it fits as asked." in table(found)
    assert not any("sinks" in name for name in names(found))


def test_what_an_engine_lacks_is_told() -> None:
    found = cheapest("llama-3-8b", 131_072, memory="24GiB", engine="transformers")
    assert names(found) == [
        "as asked",
        "prefill in steps of 2,048",
        "int8 cache, bf16 weights",
        "dense cache, int8 weights",
        "int4 cache, int8 weights",
        "dense cache, int4 weights",
        "dense cache, bf16 weights, sinks:4+window:256",
    ]
    assert [each.plan is None for each in found] == [False, False, True, False, True, False, True]
    assert "can't be had: storage int8: engine transformers has no" in table(found)


def test_nothing_fits() -> None:
    found = cheapest("llama-3-70b", 131_072, memory="8GiB", policy="window:64")
    assert not any(each.fits for each in found)
    assert not any("sinks" in name for name in names(found))  # a policy was asked for
    assert table(found).endswith("Nothing of this fits 131,072 tokens in 8.00 GiB.")


def test_without_a_memory_there_is_nothing_to_fit() -> None:
    sentence = r"memory of cpu isn't known; --memory, such as 80GiB"
    with pytest.raises(ValueError, match=sentence):
        longest("mistral-7b", device="cpu")
    with pytest.raises(ValueError, match=sentence):
        cheapest("mistral-7b", 9, device="cpu")


def test_the_longest_under_a_joined_pattern() -> None:
    found = longest("llama-3-8b", memory="24GiB", pattern="SlidingWindow(4096) | Sinks(4)")
    assert found.plan is not None
    assert found.plan.fits
