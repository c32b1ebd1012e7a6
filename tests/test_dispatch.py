import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from attnspan.dispatch import Explanation, attention, explain, received
from attnspan.kernels import native
from attnspan.kernels.reference import reference
from attnspan.patterns import Causal, Full, Pattern, Sinks, SlidingWindow
from attnspan.patterns.library import MOST
from attnspan.testing import assert_accurate, magnitudes, make_qkv, patterns

pytestmark = pytest.mark.usefixtures("poison_empty")


@given(
    patterns(),
    st.one_of(st.integers(0, 9), st.integers(40, 70)),
    st.integers(0, 150),
    st.one_of(st.none(), st.integers(-3, 20)),
    st.sampled_from([None, 0.3]),
    st.sampled_from([None, 5.0]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["auto", "reference", "native", "cpu", "sdpa"]),
)
@settings(deadline=None, max_examples=300)
def test_every_impl_is_the_oracle(
    pattern: Pattern,
    n: int,
    m: int,
    q_offset: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: bool,
    dtype: torch.dtype,
    impl: str,
) -> None:
    q, k, v = make_qkv(n, m, heads=(4, 2), dtype=dtype)
    options = {
        "scale": scale,
        "softcap": softcap,
        "sink_logits": torch.linspace(-1, 2, 4) if sinks else None,
    }
    if impl in ("sdpa", "cpu") and softcap is not None:
        with pytest.raises(ValueError, match="can't do this: it has no logit soft cap"):
            attention(q, k, v, pattern, impl=impl, **options)
        return
    got = attention(q, k, v, pattern, q_offset=q_offset, impl=impl, return_lse=True, **options)
    offset = m - n if q_offset is None else q_offset
    exact = reference(q, k, v, pattern, q_offset=offset, cast=False, **options)
    low = reference(q, k, v, pattern, q_offset=offset, cast=False, compute=dtype, **options)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    mask = pattern.sees(torch.arange(n)[:, None] + offset, torch.arange(m))
    sizes = magnitudes(q, k, v, mask, **options)
    for name, a, b, c, size in zip(("out", "lse"), got, low, exact, sizes, strict=False):
        assert_accurate(a, b, c, size, dtype, name)


def test_defaults_are_causal_with_the_last_queries() -> None:
    q, k, v = make_qkv(3, 8)
    seen = torch.ones(3, 8, dtype=torch.bool).tril(5)
    torch.testing.assert_close(attention(q, k, v), reference(q, k, v, seen)[0])
    assert not torch.allclose(attention(q, k, v, q_offset=4), reference(q, k, v, seen)[0])


def test_decode_and_chunks_equal_the_whole() -> None:
    q, k, v = make_qkv(40, 40, heads=(4, 2))
    pattern = SlidingWindow(9) | Sinks(2)
    whole = attention(q, k, v, pattern)
    for cuts in (range(1, 41), (7, 14, 40)):
        start, parts = 0, []
        for stop in cuts:
            parts.append(attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], pattern))
            start = stop
        torch.testing.assert_close(torch.cat(parts, 2), whole)


@given(
    patterns(),
    st.integers(1, 70),
    st.integers(1, 150),
    st.one_of(st.none(), st.integers(-3, 20)),
    st.sampled_from([None, 5.0]),
    st.booleans(),
    st.sampled_from(["native", "cpu", "sdpa"]),
)
@settings(deadline=None, max_examples=200)
def test_gradients_are_the_oracles(
    pattern: Pattern,
    n: int,
    m: int,
    q_offset: int | None,
    softcap: float | None,
    sinks: bool,
    impl: str,
) -> None:
    assume(softcap is None or impl == "native")
    leaves = [*make_qkv(n, m, heads=(4, 2), requires_grad=True)]
    sink = torch.linspace(-1, 2, 4, requires_grad=True) if sinks else None
    offset = m - n if q_offset is None else q_offset
    mask = pattern.sees(torch.arange(n)[:, None] + offset, torch.arange(m))
    weight = make_qkv(n, m, heads=(4, 2), seed=5)[0]

    def gradients(compute: torch.dtype | None) -> tuple:
        options = {"softcap": softcap, "sink_logits": sink}
        if compute is None:
            out, lse = attention(
                *leaves, pattern, q_offset=q_offset, impl=impl, return_lse=True, **options
            )
        else:
            out, lse = reference(*leaves, mask, compute=compute, cast=False, **options)
        total = (out * weight).sum() + torch.where(lse == -torch.inf, 0, lse).sum() * 0.5
        return torch.autograd.grad(total, [*leaves, *([sink] if sinks else [])])

    sizes = magnitudes(
        *leaves,
        mask,
        softcap=softcap,
        sink_logits=sink,
        grad_out=weight,
        grad_lse=torch.full((1, 4, n), 0.5),
    )
    both = zip(
        gradients(None), gradients(torch.float32), gradients(torch.float64), sizes[2:], strict=False
    )
    for got, low, exact, size in both:
        assert_accurate(got, low, exact, size, torch.float32, "gradient")


@pytest.mark.parametrize("impl", ["reference", "native", "cpu", "sdpa"])
def test_gradients_reach_everything(impl: str) -> None:
    q, k, v = make_qkv(6, 6, heads=(4, 2), requires_grad=True)
    sink = torch.zeros(4, requires_grad=True)
    pattern = SlidingWindow(3, include_self=False)
    out, lse = attention(q, k, v, pattern, sink_logits=sink, return_lse=True, impl=impl)
    (out.square().sum() + lse.sum()).backward()
    for x in (q, k, v, sink):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.any()


@pytest.mark.parametrize(
    ("impl", "scale", "softcap"),
    [
        *((impl, scale, None) for impl in ("native", "cpu", "sdpa") for scale in (0.0, -0.5)),
        *(("native", scale, cap) for scale, cap in ((0.0, 2.0), (20.0, 0.5), (-20.0, 0.3))),
    ],
)
def test_any_finite_scale_and_a_cap_that_saturates(impl, scale, softcap) -> None:
    given = make_qkv(40, 40, heads=(4, 2), requires_grad=True)
    options = {"scale": scale, "softcap": softcap, "return_lse": True}
    results = []
    for name in (impl, "reference"):
        out, lse = attention(*given, SlidingWindow(9), impl=name, **options)
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), given)
        results.append((out, lse, *grads))
    torch.testing.assert_close(*results, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("impl", ["native", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_nothing(impl, dtype) -> None:
    q, k, v = make_qkv(40, 40, heads=(4, 2), requires_grad=True)

    def everything() -> list:
        out, lse = attention(q, k, v, SlidingWindow(9), impl=impl, return_lse=True)
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
        with torch.no_grad():
            last = attention(q[:, :, -1:], k, v, SlidingWindow(9) | Sinks(2), impl=impl)
            return [out, lse, *grads, last, received(q, k, SlidingWindow(9))]

    expected, before = everything(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        got = everything()
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_explain_says_which_and_why() -> None:
    q, k, v = make_qkv(2, 3)
    assert explain(q, k, v).impl == "native"
    wide = [x.double() for x in (q, k, v)]
    assert explain(*wide).impl == "cpu"
    explanation = explain(*wide, Full(), softcap=30.0)
    why = ("native can't: it has no float64", "cpu can't: it has no logit soft cap")
    assert explanation == Explanation("reference", why)
    assert str(explanation) == f"reference: {'; '.join(why)}"
    assert str(explain(q, k, v, impl="reference")) == "reference: it was asked for"
    assert explain(*wide[:2], wide[2][..., :4]).impl == "reference"
    assert attention(q, k, v[..., :4]).shape == (1, 2, 2, 4)
    with pytest.raises(ValueError, match="impl 'sdpa' can't do this: it has no logit soft cap"):
        explain(q, k, v, softcap=30.0, impl="sdpa")
    for impl in ("hopper", "triton"):
        with pytest.raises(ValueError, match=f"impl '{impl}' can't do this: it "):
            explain(q, k, v, impl=impl)


q, k, v = make_qkv(2, 3, heads=(4, 2))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, k, v), {}, TypeError, "q is a NoneType; a tensor is allowed"),
        ((q[0], k, v), {}, ValueError, r"q has the shape \(4, 2, 16\); \(batch, heads, sequence"),
        ((q[..., :0], k[..., :0], v), {}, ValueError, "head_dim of at least 1"),
        ((q, k.half(), v), {}, ValueError, "k is torch.float16 on cpu; one of .* the same for"),
        ((q.int(), k.int(), v.int()), {}, ValueError, "q is torch.int32 on cpu"),
        ((q, k.to("meta"), v), {}, ValueError, "k is torch.float32 on meta"),
        ((q, k[:, :, :2], v), {}, ValueError, "don't fit"),
        ((q, k[..., :8], v), {}, ValueError, "don't fit"),
        ((q.expand(2, -1, -1, -1), k, v), {}, ValueError, "don't fit"),
        ((q[:, :3], k, v), {}, ValueError, "3 query heads and 2 KV heads; a multiple"),
        ((q, k[:, :0], v[:, :0]), {}, ValueError, "4 query heads and 0 KV heads"),
        ((q, k, v, "causal"), {}, TypeError, "pattern is 'causal'; a Pattern such as Causal"),
        ((q, k, v), {"scale": float("nan")}, ValueError, "scale is nan; None or a finite number"),
        ((q, k, v), {"scale": "1"}, ValueError, "scale is '1'"),
        ((q, k, v), {"scale": 1e300}, ValueError, "scale is 1e.300; a number up to 2"),
        ((q, k, v), {"softcap": 1e-46, "impl": "native"}, ValueError, "soft caps lie between"),
        ((q, k, v), {"softcap": 0.0}, ValueError, "softcap is 0.0; None or a finite number above"),
        (
            (q, k, v),
            {"sink_logits": torch.zeros(2)},
            ValueError,
            r"is \(2,\); .* shape \(4,\), one",
        ),
        ((q, k, v), {"sink_logits": 1.0}, ValueError, "sink_logits is 1.0; None or a float tensor"),
        ((q, k, v), {"scale": 10**400}, ValueError, "scale is 1000.*; None or a finite number"),
        ((q, k, v), {"return_lse": "yes"}, ValueError, "return_lse is 'yes'; True or False"),
        ((q.to_sparse(), k, v), {}, ValueError, "q is torch.sparse_coo; a dense tensor"),
        ((q, k, v), {"q_offset": 1.0}, ValueError, "q_offset is 1.0; None or a whole number"),
        ((q, k, v), {"q_offset": True}, ValueError, "q_offset is True"),
        ((q, k, v), {"q_offset": 2**70}, ValueError, f"None or a number from {-MOST} to {MOST}"),
        (
            (q, k, v),
            {"impl": "flash2"},
            ValueError,
            "impl is 'flash2'; one of auto, reference, native",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    arguments: tuple, options: dict, error: type[Exception], message: str
) -> None:
    for function in (attention, explain):
        with pytest.raises(error, match=f"^attention: .*{message}") as caught:
            function(*arguments, **options)
        assert "\n" not in str(caught.value)


def test_causal_is_the_default_pattern() -> None:
    assert torch.equal(attention(q, k, v), attention(q, k, v, Causal()))


@given(
    patterns(),
    st.integers(0, 40),
    st.integers(0, 90),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=80)
def test_received_is_the_sum_of_the_weights(
    pattern: Pattern,
    n: int,
    m: int,
    softcap: float | None,
    sinks: bool,
    dtype: torch.dtype,
) -> None:
    q, k, _ = make_qkv(n, m, batch=2, heads=(4, 2), dtype=dtype)
    options = {"softcap": softcap, "sink_logits": torch.linspace(-1, 2, 4) if sinks else None}
    # The weights of the definition are what an identity as the values gives.
    eye = torch.eye(m, dtype=dtype).expand(2, 2, m, m)
    weights, lse = reference(q, k, eye, pattern, q_offset=m - n, cast=False, **options)
    expected = weights.sum(2).unflatten(1, (2, 2)).sum(2).to(dtype)
    for given_lse in (None, lse.to(dtype)):
        got = received(q, k, pattern, lse=given_lse, **options)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("softcap", [2.0**-149, 1e8, 1e30])
def test_received_under_caps_that_float32_lacks(softcap) -> None:
    q, k, _ = make_qkv(50, 50)
    weights, _ = reference(q, k, torch.eye(50)[None, None], Causal(), softcap=softcap, cast=False)
    expected = weights.sum(2).sum(1, keepdim=True).float()
    torch.testing.assert_close(received(q, k, softcap=softcap), expected, atol=1e-4, rtol=1e-4)


def test_received_of_tensors_without_memory() -> None:
    nothing = torch._efficientzerotensor(q.shape)
    torch.testing.assert_close(received(nothing, k), received(torch.zeros_like(q), k))
    with FakeTensorMode():
        assert received(torch.empty(1, 2, 9, 8), torch.empty(1, 1, 9, 8)).shape == (1, 1, 9)


def test_received_takes_its_kernel_under_a_default_device_too(monkeypatch) -> None:
    called = []
    kernel = native.received
    monkeypatch.setattr(native, "received", lambda *x: called.append(1) or kernel(*x))
    with torch.device("cpu"):  # a mode that sees functions
        received(q, k)
    assert called or native.build().lack


def test_received_refuses_another_lse() -> None:
    with pytest.raises(
        ValueError, match=r"lse is torch\.float32 \(1, 4, 3\); None or a dense float"
    ):
        received(q, k, lse=torch.zeros(1, 4, 3))


def test_sentences_name_the_call_and_stay_short() -> None:
    with pytest.raises(ValueError, match=r"^received: scale is .*; None or a finite number") as got:
        received(q, k, scale=torch.ones(50, 50))
    assert len(str(got.value)) < 120
    with pytest.raises(ValueError, match=r"^attention: impl 'cudnn' .* it runs on a GPU"):
        attention(q, k, v, softcap=3.0, impl="cudnn")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.complex64], ids=str)
def test_a_log_sum_exp_of_another_kind_is_refused(dtype) -> None:
    with pytest.raises(
        ValueError, match=r"^received: lse is torch\..*; None or a dense float tensor"
    ):
        received(q, k, lse=torch.zeros(q.shape[:3]).to(dtype))
