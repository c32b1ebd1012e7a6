"""The custom operator as torch sees it: schema, autograd, fake tensors, compile, vmap."""

import pytest
import torch

from attnspan import attention, ops
from attnspan.patterns import Documents, Sinks, SlidingWindow, Strided
from attnspan.testing import make_qkv

PATTERNS = [SlidingWindow(9) | Sinks(2), Strided(3, 5), Documents((7, 20, 23))]
IMPLS = ["native", "cpu"]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
# "auto" chooses when it runs; here, where no GPU is, that is the definition.
@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_opcheck_passes(impl, pattern) -> None:
    q, k, v = make_qkv(40, 50, batch=2, heads=(4, 2), requires_grad=True)
    options = (str(pattern), 10, 0.3, None, impl)
    torch.library.opcheck(ops.attention, (q, k, v, *options))
    turned = q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    nothing = k.detach()[:, :, :0]
    torch.library.opcheck(ops.attention, (turned, nothing, nothing, *options))
    out, lse = ops.attention(q, k, v, *options)
    saved = [x.detach() for x in (q, k, v, out, lse)]
    for grad_lse in (None, torch.randn_like(lse)):
        given = (torch.randn_like(out), grad_lse, *saved, *options)
        torch.library.opcheck(ops.attention_backward, given)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("impl", ["hopper", "triton", "auto"])
def test_opcheck_passes_on_a_gpu(impl, pattern) -> None:
    shape = {"heads": (4, 2), "head_dim": 64, "dtype": torch.float16, "device": "cuda"}
    q, k, v = make_qkv(40, 50, batch=2, **shape, requires_grad=True)
    options = (str(pattern), 10, 0.3, None, impl)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for some in (
        (q, k, v),
        (q.detach().transpose(1, 2).contiguous().transpose(1, 2), k.detach(), v.detach()),
        (q.detach()[:, :1].expand(-1, 4, -1, -1), k.detach(), v.detach()),
        (q.detach()[:, :, :1], k.detach(), v.detach()),
    ):
        torch.library.opcheck(ops.attention, (*some, *options), test_utils=checks)


def test_the_definition_is_no_way_out_where_it_is_large(monkeypatch) -> None:
    q, k, v = make_qkv(40, 50)
    monkeypatch.setattr(ops, "_MOST_SCORES", 2 * 40 * 50 - 1)
    with pytest.raises(ValueError, match=r"within torch\.compile no kernel of ours can do q"):
        ops.attention(q, k, v, "Causal()", 10, 0.3, None, "auto")


@pytest.mark.parametrize("impl", IMPLS)
def test_it_compiles_whole(impl) -> None:
    pattern = SlidingWindow(9) | Sinks(2)

    def f(q, k, v):
        return attention(q, k, v, pattern, return_lse=True, impl=impl)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (30, 31, 40):
        given = make_qkv(n, 50, heads=(4, 2), requires_grad=True)
        results = [g(*given) for g in (f, compiled)]
        grads = [torch.autograd.grad(out.square().sum() + lse.sum(), given) for out, lse in results]
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_pattern_may_change_or_be_made_inside(dynamic) -> None:
    q, k, v = make_qkv(30, 30)

    def given(q, pattern):
        return attention(q, k, v, pattern)

    def made(q, window):
        return attention(q, k, v, SlidingWindow(window) | Documents((9, window)))

    for f, options in (
        (given, [SlidingWindow(9), SlidingWindow(4), Documents((7, 23)), Documents((8, 22))]),
        (made, [9, 4, 21]),
    ):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for option in options:
            torch.testing.assert_close(compiled(q, option), f(q, option))


@pytest.mark.parametrize("impl", IMPLS)
def test_it_maps_over_the_batch(impl) -> None:
    q, k, v = make_qkv(12, 20, batch=3, heads=(4, 2))
    several = torch.stack([q, q + 1])

    def f(q, v):
        return attention(q, k, v, SlidingWindow(5), sink_logits=torch.ones(4), impl=impl)

    got = torch.func.vmap(f, in_dims=(0, None))(several, v)
    torch.testing.assert_close(got, torch.stack([f(x, v) for x in several]))
    moved = torch.func.vmap(f, in_dims=(3, None), out_dims=1)(several.movedim(0, 3), v)
    torch.testing.assert_close(moved, got.movedim(0, 1))


# Torch warns of its own past when it first makes a tangent.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("impl", IMPLS)
def test_forward_mode_derivatives_are_refused(impl) -> None:
    q, k, v = make_qkv(12, 20, heads=(4, 2))
    with pytest.raises(ValueError, match="forward-mode tangent"):
        torch.func.jvp(lambda x: attention(x, k, v, impl=impl), (q,), (q,))


def test_a_gradient_of_a_gradient_is_refused() -> None:
    q, k, v = make_qkv(12, 20, heads=(4, 2), requires_grad=True)
    (first,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward"):
        first.sum().backward()
