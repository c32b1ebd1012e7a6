"""A ring of threads against the definition, over the whole sequence, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnspan import ring_attention
from attnspan.kernels.reference import reference
from attnspan.patterns import Pattern
from attnspan.ring import Layout
from attnspan.ring.simulated import simulate
from attnspan.testing import assert_accurate, magnitudes, make_qkv

NAMES = ("out", "lse", "grad q", "grad k", "grad v", "grad sinks")


@dataclass(frozen=True)
class Problem:
    """One whole sequence, and what the definition makes of it."""

    inputs: tuple[Tensor, ...]  # q, k, v, sinks
    grads: tuple[Tensor, Tensor]  # of out and lse
    exact: tuple[Tensor, ...]
    low: tuple[Tensor, ...]
    sizes: tuple[float, ...]


@lru_cache(maxsize=32)
def problem(
    pattern: Pattern,
    n: int = 48,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float64,
    batch: int = 1,
    head_dim: int = 8,
    device: str = "cpu",
) -> Problem:
    shape = {"batch": batch, "heads": heads, "head_dim": head_dim}
    q, k, v = make_qkv(n, n, **shape, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    sinks, grad_out = normal(heads[0]), normal(batch, heads[0], n, head_dim)
    grad_lse = normal(batch, heads[0], n).to(torch.promote_types(dtype, torch.float32))

    def solved(compute: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(compute, copy=True).requires_grad_() for x in (q, k, v, sinks)]
        out, lse = reference(*leaves[:3], pattern, sink_logits=leaves[3], compute=compute)
        torch.autograd.backward([out, lse], [grad_out.to(out.dtype), grad_lse.to(lse.dtype)])
        return out.detach(), lse.detach(), *(x.grad for x in leaves)  # type: ignore[misc]

    place = torch.arange(n, device=device)
    mask = pattern.sees(place[:, None], place)
    sizes = magnitudes(q, k, v, mask, sink_logits=sinks, grad_out=grad_out, grad_lse=grad_lse)
    return Problem(
        (q, k, v, sinks), (grad_out, grad_lse), solved(torch.float64), solved(dtype), sizes
    )


def ringed(
    given: Problem, pattern: Pattern, layout: Layout, world: int, schedule: str, **options: object
) -> tuple[tuple[Tensor, ...], list[int]]:
    """What the ranks make of it together, in the order of `NAMES`, and the bytes that each sent."""
    *whole, sinks = given.inputs

    def work(t):
        mine = [layout.shard(x, 2, t.rank, world).requires_grad_() for x in whole]
        mine.append(sinks.clone().requires_grad_())
        out, lse = ring_attention(
            *mine[:3],
            pattern,
            group=t,
            layout=layout,
            schedule=schedule,
            sink_logits=mine[3],
            return_lse=True,
            **options,
        )
        forward = t.sent
        back = [layout.shard(x, 2, t.rank, world) for x in given.grads]
        torch.autograd.backward(
            [out, lse], [x.to(y.dtype) for x, y in zip(back, (out, lse), strict=True)]
        )
        return out.detach(), lse.detach(), *(x.grad for x in mine), forward

    ranks = simulate(world, work)
    together = [layout.unshard([each[i] for each in ranks], 2) for i in range(5)]
    together.append(sum(each[5] for each in ranks))
    return tuple(together), [each[6] for each in ranks]


def check(got: tuple[Tensor, ...], given: Problem, world: int) -> None:
    """Raises AssertionError unless every result is as near as its dtype allows.

    In float64 the definition itself is exact, so there each of the parts, up to two from each rank,
    may round its terms once.
    """
    dtype = given.inputs[0].dtype
    parts = 2 * world if dtype == torch.float64 else 1
    for name, *each, size in zip(NAMES, got, given.low, given.exact, given.sizes, strict=True):
        assert_accurate(*each, parts * size, dtype, name)
