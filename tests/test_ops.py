"""The custom operator as torch sees it: schema, autograd, fake tensors, compile, vmap."""

from functools import partial

import pytest
import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

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


class _Operators(TorchDispatchMode):
    """Notes the names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _Mine(torch.Tensor):
    pass


def _never(*_) -> None:
    raise AssertionError("the operator was called")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needed", [(1, 1, 1), (0, 0, 1), (0, 0, 0)], ids=str)
def test_eager_calls_give_what_the_operator_gives(impl, needed, monkeypatch) -> None:
    made = make_qkv(40, 50, batch=2, heads=(4, 2))
    leaves = [x.requires_grad_(bool(y)) for x, y in zip(made, needed, strict=True)]
    inputs = [x for x in leaves if x.requires_grad]
    options = ("SlidingWindow(9) | Sinks(2)", 10, 0.3, None, impl)
    wanted = ops.attention(*leaves, *options)
    weights = [torch.randn_like(x) for x in wanted]
    saved = [x.detach() for x in (*leaves, *wanted)]
    gradients = [
        ops.attention_backward(weights[0] * a, weights[1] * b if b else None, *saved, *options)
        for a, b in ((1, 1), (1, 0), (0, 1))
    ]
    monkeypatch.setattr(ops, "attention", _never)
    monkeypatch.setattr(ops, "attention_backward", _never)
    got = ops.run(*leaves, *options)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert [x.requires_grad for x in got] == [bool(inputs)] * 2
    with torch.no_grad():
        assert not any(x.requires_grad for x in ops.run(*leaves, *options))
    if not inputs:
        return
    for some, expected in zip(([0, 1], [0], [1]), gradients, strict=True):
        grads = torch.autograd.grad(
            [got[i] for i in some], inputs, [weights[i] for i in some], retain_graph=True
        )
        expected = [x for x, y in zip(expected, needed, strict=True) if y]
        torch.testing.assert_close(list(grads), expected, rtol=0, atol=0)


def test_what_torch_would_see_is_the_operator(monkeypatch) -> None:
    q, k, v = make_qkv(12, 20, heads=(4, 2), requires_grad=True)
    with _Operators() as seen:
        torch.autograd.grad(attention(q, k, v).sum(), q)
    assert {"attnspan::attention", "attnspan::attention_backward"} <= set(seen.names)
    out = attention(q, k, v)
    with _Operators() as seen:
        (mapped,) = torch.autograd.grad(out, q, torch.stack([out, -out]), is_grads_batched=True)
    assert "attnspan::attention_backward" in seen.names
    torch.testing.assert_close(mapped[0], -mapped[1])
    called = []
    operator = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *x: called.append(1) or operator(*x))
    attention(q.as_subclass(_Mine), k, v)
    with torch.device("cpu"):  # a mode that sees functions
        attention(q, k, v)
    assert len(called) == 2


@pytest.mark.parametrize("impl", ["native", "cpu"])
def test_tensors_that_only_look_plain(impl) -> None:
    q, k, v = make_qkv(12, 20, heads=(4, 2), requires_grad=True)
    out = attention(q, k, v, impl=impl)
    weight = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, q, weight, retain_graph=True)
    stacked = torch.stack([weight, -weight])
    (mapped,) = torch.autograd.grad(out, q, stacked, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(mapped, torch.stack([grad, -grad]))
    (none,) = torch.autograd.grad(out, q, torch._efficientzerotensor(out.shape))
    assert not none.any()
    with torch.no_grad():
        negative = torch._neg_view(q)
        expected = attention(-q, k, v, impl=impl)
        torch.testing.assert_close(attention(negative, k, v, impl=impl), expected)


def test_hooks_and_checkpoints_see_what_is_saved() -> None:
    q, k, v = make_qkv(12, 20, heads=(4, 2), requires_grad=True)

    def f(*given):
        return attention(*given, SlidingWindow(5)).sin()

    (wanted,) = torch.autograd.grad(f(q, k, v).sum(), q)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        out = attention(q, k, v, SlidingWindow(5))
    assert [x.shape for x in packed] == [x.shape for x in (q, k, v, out, out[..., 0])]
    again = checkpoint.checkpoint(f, q, k, v, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), q)[0], wanted)

    def kept(context, operator, *_, **__):
        policies = checkpoint.CheckpointPolicy
        is_ours = operator.name() == "attnspan::attention"
        return policies.MUST_SAVE if is_ours else policies.MUST_RECOMPUTE

    again = checkpoint.checkpoint(
        f,
        *(q, k, v),
        use_reentrant=False,
        context_fn=partial(checkpoint.create_selective_checkpoint_contexts, kept),
    )
    with _Operators() as seen:
        torch.testing.assert_close(torch.autograd.grad(again.sum(), q)[0], wanted)
    assert "attnspan::attention" not in seen.names
