"""Decoding over shares of the keys equals the definition over all of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from attnspan.kernels.reference import reference
from attnspan.kernels.view import KVView, Part
from attnspan.patterns import Causal, SlidingWindow
from attnspan.ring import RingMismatch, ring_decode
from attnspan.ring.simulated import simulate
from attnspan.testing import assert_accurate, magnitudes, make_qkv
from attnspan.views import attend_share

N, M = 37, 3
PATTERNS = {"all": None, "causal": Causal(), "window": SlidingWindow(9)}


def dealt(ranks: int, how: str) -> list[list[int]]:
    """Which keys each rank holds."""
    if how == "in turn":
        return [list(range(rank, N, ranks)) for rank in range(ranks)]
    if how == "all on the last":
        return [[] for _ in range(ranks - 1)] + [list(range(N))]
    edges = [0, *sorted(range(5, 5 + 7 * (ranks - 1), 7)), N]  # uneven runs
    return [list(range(a, b)) for a, b in itertools.pairwise(edges)]


def exact(q, k, v, pattern, **options):
    seen = torch.ones(q.shape[2], N, dtype=torch.bool) if pattern is None else pattern
    return reference(q, k, v, seen, q_offset=0 if pattern is None else N - q.shape[2], **options)


def decode(ranks, how, q, k, v, pattern, **options):
    shares = dealt(ranks, how)

    def work(ring):
        mine = torch.tensor(shares[ring.rank], dtype=torch.long)
        where = {} if pattern is None else {"positions": mine, "q_offset": N - q.shape[2]}
        given = q, k[:, :, mine], v[:, :, mine], pattern
        got = ring_decode(*given, group=ring, return_lse=True, **where, **options)
        return *got, ring.sent

    return simulate(ranks, work)


@pytest.mark.parametrize("how", ["in turn", "runs", "all on the last"])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_definition_in_float64(name, how) -> None:
    q, k, v = make_qkv(M, N, batch=2, heads=(4, 2), dtype=torch.float64)
    for ranks in (1, 2, 3, 4):
        expected, lse = exact(q, k, v, PATTERNS[name])
        results = decode(ranks, how, q, k, v, PATTERNS[name])
        for got, got_lse, sent in results:
            assert torch.equal(got, results[0][0]), "ranks differ"
            assert (got - expected).abs().max() < 1e-13
            assert (got_lse - lse).abs().max() < 1e-13
            assert sent == 2 * 4 * M * (16 + 1) * 8 * (ranks - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 70])
def test_other_dtypes_are_as_near_as_they_can_be(dtype, m) -> None:
    q, k, v = make_qkv(min(m, N), N, heads=(8, 2), head_dim=32, dtype=dtype)
    mask = torch.ones(q.shape[2], N, dtype=torch.bool)
    want, _ = exact(q.double(), k.double(), v.double(), None)
    low, _ = reference(q, k, v, mask, compute=dtype, cast=False)
    for ranks in (2, 4):
        for got, _, _ in decode(ranks, "in turn", q, k, v, None):
            assert got.dtype == dtype
            assert_accurate(got, low, want, magnitudes(q, k, v, mask)[0], dtype)


@pytest.mark.parametrize(
    "options", [{"scale": 0.3}, {"softcap": 1.5}, {"sinks": True}, {"softcap": 3.0, "sinks": True}]
)
def test_scale_soft_cap_and_sink_logits(options) -> None:
    q, k, v = make_qkv(M, N, heads=(4, 2), dtype=torch.float64)
    options = dict(options)
    if options.pop("sinks", False):
        options["sink_logits"] = torch.linspace(-1, 2, 4, dtype=torch.float64)
    expected, lse = exact(q, k, v, PATTERNS["window"], **options)
    for got, got_lse, _ in decode(3, "in turn", q, k, v, PATTERNS["window"], **options):
        assert (got - expected).abs().max() < 1e-13
        assert (got_lse - lse).abs().max() < 1e-13


def test_a_query_that_sees_no_key_anywhere() -> None:
    q, k, v = make_qkv(M, N, dtype=torch.float64)
    for got, lse, _ in decode(
        2, "in turn", q, k, v, SlidingWindow(1, include_self=False) & ~Causal()
    ):
        assert torch.equal(got, torch.zeros_like(q))
        assert (lse == -torch.inf).all()


def test_a_lost_share_is_seen() -> None:
    q, k, v = make_qkv(M, N, dtype=torch.float64)
    expected, _ = exact(q, k, v, None)

    def work(ring):
        mine = slice(ring.rank, 0 if ring.rank == 1 else None, 3)
        return ring_decode(q, k[:, :, mine], v[:, :, mine], group=ring)

    assert (simulate(3, work)[0] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("m", [1, 5, 200])
def test_shares_of_which_some_queries_see_nothing(dtype, softcap, m) -> None:
    """Every kernel behind it: for few queries and many, capped or not, in one part or two."""
    q, k, v = make_qkv(m, 64, heads=(4, 2), head_dim=32, dtype=dtype)
    seen = torch.rand(m, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    seen[0] = False
    seen[:, :20] &= torch.arange(m)[:, None] % 2 == 0
    mask = torch.zeros(m, 64, dtype=dtype).masked_fill_(~seen, -torch.inf)
    parts = tuple(Part(q, k[:, :, s], v[:, :, s], mask[:, s]) for s in (slice(20), slice(20, 64)))
    want, want_lse = reference(q.double(), k.double(), v.double(), seen, softcap=softcap)
    low, low_lse = reference(q, k, v, seen, softcap=softcap, compute=dtype, cast=False)
    large = magnitudes(q, k, v, seen, softcap=softcap)
    for view in (KVView((Part(q, k, v, mask),)), KVView(parts)):
        out, lse = attend_share(view, softcap=softcap)
        assert out.dtype == lse.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
        assert_accurate(out, low, want, large[0], dtype, "out")
        assert_accurate(lse, low_lse, want_lse, large[1], dtype, "lse")


WRONG = [
    ("q of other numbers", lambda r: {"q": r}, "q"),
    ("scale", lambda r: {"scale": 1.0 + r}, "scale"),
    ("softcap", lambda r: {"softcap": 1.0 + r}, "softcap"),
    ("pattern", lambda r: {"pattern": SlidingWindow(4 + r)}, "pattern"),
    ("one rank's k", lambda r: {"k": (1, 1, 5, 16 - 4 * r)}, "don't fit"),
    (
        "one rank's dtype",
        lambda r: {"dtype": (torch.float64, torch.float32)[r]},
        "the same for q, k and v",
    ),
    ("one rank's softcap", lambda r: {"softcap": (1.0, -1.0)[r]}, "softcap is -1.0"),
]


@pytest.mark.parametrize(("change", "named"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_differs_is_refused_on_all_ranks_alike(change, named) -> None:
    q, k, _ = make_qkv(1, 5, dtype=torch.float64)

    def work(ring):
        options = change(ring.rank)
        mine = q + options.pop("q", 0)
        kv = k
        if "k" in options:
            kv = torch.zeros(options.pop("k"), dtype=torch.float64)
        kv = kv.to(options.pop("dtype", torch.float64))
        pattern = options.pop("pattern", None)
        where = {} if pattern is None else {"positions": torch.arange(5), "q_offset": 4}
        with pytest.raises(RingMismatch, match=named) as caught:
            ring_decode(mine, kv, kv, pattern, group=ring, **where, **options)
        assert ring.sent == 0
        return str(caught.value)

    first, second = simulate(2, work)
    assert first == second


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"q": torch.zeros(1, 3, 1, 16)}, "3 query heads and 2 KV heads"),
        ({"v": torch.zeros(1, 2, 5, 8)}, "one shape is allowed"),
        ({"positions": torch.arange(5)}, "together or not at all"),
        ({"sink_logits": torch.zeros(3)}, r"\(4,\), one for each query head"),
        ({"pattern": Causal()}, "together or not at all"),
        (
            {"pattern": Causal(), "q_offset": 4, "positions": torch.arange(4)},
            r"\(5,\), one for each key",
        ),
        (
            {"q": torch.zeros(1, 4, 1, 16, requires_grad=True)},
            r"under torch.no_grad\(\) it is allowed",
        ),
    ],
)
def test_what_all_ranks_do_wrong_is_a_value_error(change, why) -> None:
    given = {"q": torch.zeros(1, 4, 1, 16), "k": torch.zeros(1, 2, 5, 16)}
    given = {**given, "v": given["k"], **change}

    def work(ring):
        with pytest.raises(ValueError, match=why) as caught:
            ring_decode(**given, group=ring)
        assert not isinstance(caught.value, RingMismatch)
        return ring.sent

    assert simulate(2, work) == [0, 0]
