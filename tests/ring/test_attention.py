"""Ring attention is what one process computes: every pattern, layout, schedule and world size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ring_oracle as oracle
import torch

from attnspan import ring_attention
from attnspan.patterns import (
    Blockwise,
    Causal,
    Documents,
    Full,
    GlobalTokens,
    Longformer,
    Sinks,
    SlidingWindow,
    Strided,
)
from attnspan.ring import Contiguous, RingMismatch, Striped, ZigZag, flow
from attnspan.ring.groups import Alone
from attnspan.ring.options import task_of
from attnspan.ring.simulated import simulate
from attnspan.testing import assert_accurate

EVERYWHERE = [
    Causal(),
    Full(),
    Sinks(3),
    GlobalTokens((2, 17)),
    Documents((10, 23, 9)),
    Documents((10, 23, 15), causal=False),
    Blockwise(7, before=True),
]
NEAR = [
    SlidingWindow(5),
    SlidingWindow(30),
    SlidingWindow(4, dilation=3),
    SlidingWindow(5) | Sinks(3),
    Longformer(5, (2, 17)),
    Longformer(5, 3, right=2),
    Strided(3, 5),
    SlidingWindow(9) & Documents((10, 23, 15)),
    Causal() & ~SlidingWindow(9),
]
CASES = [
    (pattern, layout)
    for pattern in (*EVERYWHERE, *NEAR)
    for layout in (Contiguous(), ZigZag(), Striped())
    if pattern in EVERYWHERE or layout != Striped()
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # ranks are threads already
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("pattern", "layout"), CASES, ids=str)
def test_it_is_what_one_process_computes(pattern, layout) -> None:
    given = oracle.problem(pattern, dtype=torch.float32)
    for world in (1, 2, 3, 4, 8):
        got, _ = oracle.ringed(given, pattern, layout, world, "ring")
        oracle.check(got, given, world)


@pytest.mark.parametrize(
    ("schedule", "world"),
    [("allgather", 3), ("ulysses", 2), ("ulysses", 4), ("2x2", 4), ("2x4", 8), ("4x2", 8)],
)
@pytest.mark.parametrize(("pattern", "layout"), CASES, ids=str)
def test_other_schedules_give_the_same(pattern, layout, schedule, world) -> None:
    given = oracle.problem(pattern)
    got, _ = oracle.ringed(given, pattern, layout, world, schedule)
    oracle.check(got, given, world)


@pytest.mark.parametrize("heads", [(4, 1), (6, 3), (4, 4)], ids=["MQA", "GQA", "MHA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_and_half_precision(dtype, heads) -> None:
    for pattern, layout in (
        (Causal(), ZigZag()),
        (SlidingWindow(20) | Sinks(2), Contiguous()),
        (Documents((30, 50)), Striped()),
    ):
        given = oracle.problem(pattern, 96, heads, dtype, batch=2)
        got, _ = oracle.ringed(given, pattern, layout, 4, "ring")
        oracle.check(got, given, 4)


def test_the_error_does_not_grow_with_the_ring() -> None:
    given = oracle.problem(Causal(), 256, (2, 1), torch.bfloat16, head_dim=16)
    errors = {}
    for world in (1, 2, 4, 8, 16):
        (out, *_), _ = oracle.ringed(given, Causal(), ZigZag(), world, "ring")
        errors[world] = (out.double() - given.exact[0]).norm() / given.exact[0].norm()
    assert max(errors.values()) < 1.25 * errors[1], errors


def test_int8_in_flight_is_near() -> None:
    pattern = SlidingWindow(40) | Sinks(2)
    given = oracle.problem(pattern, 96, (4, 2), torch.float32, head_dim=32)
    exact, plain = oracle.ringed(given, pattern, Contiguous(), 4, "ring")
    coded, few = oracle.ringed(given, pattern, Contiguous(), 4, "ring", wire="int8")
    for name, a, b in zip(oracle.NAMES, coded, exact, strict=True):
        error = float((a - b).norm() / b.norm())
        assert 1e-5 < error < 0.02, (name, error)
    assert max(few) < max(plain) / 2.5  # a quarter, and the scales


def test_scales_soft_caps_and_widths() -> None:
    q, k = torch.randn(2, 1, 4, 32, 8, dtype=torch.float64)
    k = k[:, :2]
    v = torch.randn(1, 2, 32, 5, dtype=torch.float64)
    from attnspan import attention

    for options in (
        {"scale": -0.3},
        {"scale": 0.0},
        {"softcap": 2.0},
        {"scale": 0.7, "softcap": 9.0},
    ):
        for schedule in ("ring", "ulysses"):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            attention(*leaves, SlidingWindow(9), **options).square().sum().backward()

            def work(t, options=options, schedule=schedule):
                mine = [ZigZag().shard(x, 2, t.rank, 2).requires_grad_() for x in (q, k, v)]
                given = {"group": t, "layout": ZigZag(), "schedule": schedule, **options}
                ring_attention(*mine, SlidingWindow(9), **given).square().sum().backward()
                return [x.grad for x in mine]

            for leaf, *parts in zip(leaves, *simulate(2, work), strict=True):
                assert torch.allclose(ZigZag().unshard(parts, 2), leaf.grad, atol=1e-12), options


@pytest.mark.parametrize(
    ("pattern", "layout", "schedule"),
    [
        (Causal(), ZigZag(), "ring"),
        (SlidingWindow(5) | Sinks(2), Contiguous(), "ring"),
        (Documents((10, 22)), Striped(), "allgather"),
        (Strided(3, 5), ZigZag(), "2x2"),
    ],
    ids=str,
)
def test_no_output_learns_of_a_token_that_its_pattern_hides(pattern, layout, schedule) -> None:
    n, world = 32, 4
    whole = torch.randn(3, 1, 4, n, 8, dtype=torch.float64)

    def outputs(values):
        def work(t):
            q, k, v = layout.shard(values, 3, t.rank, world)
            return ring_attention(q, k, v, pattern, group=t, layout=layout, schedule=schedule)

        return layout.unshard(simulate(world, work), 2)

    before = outputs(whole)
    for j in range(0, n, 5):
        changed = whole.clone()
        changed[1:, :, :, j] += 1
        moved = (outputs(changed) != before).any(-1).any(1)[0]
        assert torch.equal(moved, torch.as_tensor(pattern.sees(torch.arange(n), j))), j


def _dropped(exchange):
    return replace(exchange, rounds=exchange.rounds[:-1])


def _short(exchange):
    """Every piece without its first token; queries see what is left where it would have been."""

    def cut(pieces):
        return tuple(replace(p, start=p.start + 1) for p in pieces)

    rounds = tuple(
        replace(
            each,
            receives=cut(each.receives),
            sends=tuple((peer, cut(pieces)) for peer, pieces in each.sends),
            calls=tuple(replace(call, q_offset=call.q_offset - 1) for call in each.calls),
        )
        for each in exchange.rounds
    )
    return replace(exchange, rounds=rounds)


@pytest.mark.parametrize("mutation", [_dropped, _short])
def test_a_wrong_plan_is_seen(monkeypatch, mutation) -> None:
    pattern = SlidingWindow(7)
    given = oracle.problem(pattern)

    def mutated(*arguments):
        planned = task_of(*arguments)
        return replace(planned, exchange=mutation(planned.exchange))

    monkeypatch.setattr("attnspan.ring.attention.task_of", mutated)
    got, _ = oracle.ringed(given, pattern, Contiguous(), 4, "ring")
    with pytest.raises(AssertionError, match="error"):
        oracle.check(got, given, 4)


def test_a_lost_gradient_is_seen(monkeypatch) -> None:
    given = oracle.problem(Causal())
    monkeypatch.setattr(flow._Returns, "finish", lambda self: None)
    got, _ = oracle.ringed(given, Causal(), ZigZag(), 2, "ring")
    with pytest.raises(AssertionError, match="grad k"):
        oracle.check(got, given, 4)


def test_second_derivatives_are_refused() -> None:
    def work(t):
        q, k, v = torch.randn(3, 1, 2, 8, 4, requires_grad=True)
        out = ring_attention(q, k, v, group=t)
        (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    simulate(1, work)


def _call(t, n=8, dtype=torch.float32, pattern=None, **options):
    q, k, v = torch.zeros(3, 1, 4, n, 4, dtype=dtype)
    return ring_attention(q, k[:, :2], v[:, :2], pattern or Causal(), group=t, **options)


@pytest.mark.parametrize(
    ("differing", "words"),
    [
        ({"n": 6}, r"rank 2 calls with q \(1, 4, 6, 4\) float32 on cpu, rank 0 with q? ?\(1, 4, 8"),
        ({"dtype": torch.float64}, "rank 2 calls with q .* float64"),
        ({"pattern": SlidingWindow(4)}, r"pattern SlidingWindow\(4\), rank 0 with Causal"),
        ({"layout": ZigZag()}, "rank 2 calls with layout ZigZag"),
        ({"schedule": "allgather"}, "rank 2 calls with schedule 'allgather'"),
        ({"scale": 2.0}, "rank 2 calls with scale 2.0"),
        ({"wire": "int8"}, "rank 2 calls with wire 'int8'"),
        ({"impl": "nothing"}, "rank 2 calls with impl 'nothing'"),
    ],
)
def test_ranks_that_differ_are_refused_alike(differing, words) -> None:
    def work(t):
        with pytest.raises(RingMismatch, match=words):
            _call(t, **(differing if t.rank == 2 else {}))
        return t.sent

    assert simulate(3, work) == [0, 0, 0]


@pytest.mark.parametrize(
    ("world", "options", "error", "words"),
    [
        (4, {"n": 7, "layout": ZigZag()}, ValueError, "ZigZag: 28 tokens on 4 ranks; a multiple"),
        (2, {"layout": Striped(), "pattern": SlidingWindow(4)}, ValueError, "layout is Striped"),
        (2, {"schedule": "3x2"}, ValueError, "schedule is '3x2' on 2 ranks"),
        (2, {"schedule": "star"}, ValueError, "schedule is 'star'; one of auto, ring"),
        (3, {"schedule": "ulysses"}, ValueError, "4 query heads on 3 ranks"),
        (2, {"wire": "int3"}, ValueError, "wire is 'int3'; None or 'int8'"),
        (2, {"impl": "fa4"}, ValueError, "impl is 'fa4'; one of auto, reference"),
        (2, {"impl": "hopper"}, ValueError, "ring_attention: impl is 'hopper'; .* 'reference' can"),
        (2, {"n": 0}, ValueError, r"q \(1, 4, 0, 4\) has no tokens"),
        (2, {"wire": "int8", "schedule": "ulysses"}, ValueError, "wire is 'int8' with schedule"),
        (2, {"wire": "int8", "layout": Striped()}, ValueError, "wire is 'int8' with layout"),
        (2, {"layout": "zigzag"}, TypeError, "layout is 'zigzag'; Contiguous"),
        (2, {"scale": float("nan")}, ValueError, "ring_attention: scale is nan"),
        (2, {"pattern": "Causal()"}, TypeError, "ring_attention: pattern is"),
        (2, {"return_lse": 1}, ValueError, "ring_attention: return_lse is 1"),
    ],
)
def test_bad_input_is_one_sentence_on_every_rank(world, options, error, words) -> None:
    def work(t):
        with pytest.raises(error, match=words):
            _call(t, **options)
        return t.sent

    assert simulate(world, work) == [0] * world


def test_shards_of_queries_and_keys_must_match() -> None:
    def work(t):
        q, k = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 6, 4)
        with pytest.raises(ValueError, match="have other lengths"):
            ring_attention(q, k, k, group=t)

    simulate(2, work)


def test_a_rank_that_fails_is_named_by_the_others() -> None:
    from attnspan import RingPeerLost

    def work(t):
        if t.rank == 1:
            raise KeyError("of its own")
        with pytest.raises(RingPeerLost) as caught:
            _call(t, layer=7)
        assert caught.value.ranks == (1,)
        assert caught.value.layer == 7

    with pytest.raises(KeyError, match="of its own"):
        simulate(3, work)


def test_half_precision_is_held_to_its_digits() -> None:
    """The tolerance of the tests above isn't so wide that a wrong scale would pass."""
    given = oracle.problem(Causal(), dtype=torch.float32)
    got, _ = oracle.ringed(given, Causal(), ZigZag(), 2, "ring", scale=8**-0.5 * 1.001)
    with pytest.raises(AssertionError):
        assert_accurate(got[0], given.low[0], given.exact[0], given.sizes[0], torch.float32, "out")


@pytest.mark.parametrize("schedule", ["ulysses", "2x2"])
def test_odd_counts_of_sixteen_bits_travel_with_float32(schedule) -> None:
    given = oracle.problem(Causal(), 36, (4, 2), torch.bfloat16, head_dim=5)
    got, _ = oracle.ringed(given, Causal(), Contiguous(), 4, schedule)
    oracle.check(got, given, 4)


def test_gradients_of_a_sum_are_expanded_tensors() -> None:
    def work(t, schedule):
        q, k, v = torch.randn(3, 1, 2, 1, 1, generator=torch.Generator().manual_seed(t.rank))
        q.requires_grad_()
        ring_attention(q, k, v, group=t, schedule=schedule).sum().backward()
        return q.grad

    one, other = (simulate(2, lambda t, s=s: work(t, s)) for s in ("ring", "ulysses"))
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_checkpointed_region_may_end_in_it() -> None:
    from torch.utils.checkpoint import checkpoint

    def work(t):
        grads = []
        for checkpointed in (False, True):
            torch.manual_seed(t.rank)
            q, k, v = torch.randn(3, 1, 2, 8, 4, dtype=torch.float64).requires_grad_()
            leaf = q.detach().requires_grad_()

            def attend(x, k=k, v=v):
                return ring_attention(x * 2, k.detach(), v.detach(), group=t)

            out = checkpoint(attend, leaf, use_reentrant=False) if checkpointed else attend(leaf)
            out.square().sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)

    simulate(2, work)


def test_compiled_it_runs_as_it_is() -> None:
    q, k, v = torch.randn(3, 1, 2, 8, 4)

    @torch.compile(backend="eager")
    def step(q, k, v):
        return ring_attention(q + 1, k, v, group=Alone()) * 2

    assert torch.equal(step(q, k, v), ring_attention(q + 1, k, v, group=Alone()) * 2)


def test_odd_counts_of_codes_travel_with_float32() -> None:
    given = oracle.problem(Causal(), 36, (4, 2), torch.float32, head_dim=5)
    exact, _ = oracle.ringed(given, Causal(), Contiguous(), 4, "allgather")
    coded, _ = oracle.ringed(given, Causal(), Contiguous(), 4, "allgather", wire="int8")
    for a, b in zip(coded, exact, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.03


def test_int8_tells_nothing_of_later_tokens() -> None:
    whole = torch.randn(3, 1, 2, 64, 8)

    def outputs(values):
        def work(t):
            q, k, v = ZigZag().shard(values, 3, t.rank, t.size)
            given = {"group": t, "layout": ZigZag(), "schedule": "ring", "wire": "int8"}
            return ring_attention(q, k, v, Causal(), **given)

        return ZigZag().unshard(simulate(2, work), 2)

    changed = whole.clone()
    changed[1:, :, :, -1] *= 50
    assert torch.equal(outputs(changed)[:, :, :-1], outputs(whole)[:, :, :-1])


def test_a_sink_of_minus_infinity_has_no_gradient() -> None:
    def work(t):
        q, k, v = torch.randn(3, 1, 2, 4, 4)
        sinks = torch.full((2,), -torch.inf, requires_grad=True)
        pattern = SlidingWindow(2, include_self=False)  # whose first query sees nothing
        ring_attention(q, k, v, pattern, group=t, sink_logits=sinks).sum().backward()
        return sinks.grad

    for grad in simulate(2, work):
        assert torch.equal(grad, torch.zeros(2))


def test_measuring_leaves_the_users_random_numbers_alone() -> None:
    def work(t):
        x = torch.ones(3, 1, 2, 8, 4)
        before = torch.get_rng_state()
        ring_attention(*x, group=t, schedule="auto")
        return torch.equal(before, torch.get_rng_state()), t.sent

    (alike, _), (_, sent) = simulate(2, work)
    assert alike
    assert sent < 2**12
