"""How far a model really sees: what one token changes, against the distance to it.

Measured in two ways that share nothing but the model. `gradients`: the norm of the gradient of the
log-probability of the token that follows place i, with respect to the input embedding at j.
`changes`: the token at j is replaced by another, and the model's distribution at i >= j is held
against the one before, as Kullback and Leibler's divergence. Both are exactly zero where no path
leads from j to i: a masked weight is a zero, not a small number, and all that is compared went
through the same kernels in the same shapes, so that what depends on the same numbers has the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnspan.evaluation.influence import Influence, Sums

FIRST = 4
"""Tokens at the start whose influence is summed apart: as sinks they act at every distance."""

PLACES = 8
"""Places of each sequence that are asked for gradients."""

REPLACED = 32
"""Tokens of each sequence that are replaced: few of them change much, so the mean needs many."""

# Tokens in one batch of forwards.
_CPU_TOKENS, _CUDA_TOKENS = 4096, 32_768


@dataclass(frozen=True)
class Reach:
    """The measured reach of a model.

    Attributes:
        bound: the distance that was held to be the farthest possible; None: no bound.
        length: tokens of each sequence.
        sequences: how many.
        gradients: see the module.
        changes: see the module.
    """

    bound: int | None
    length: int
    sequences: int
    gradients: Influence
    changes: Influence

    @property
    def defects(self) -> tuple[str, ...]:
        """A sentence for each measure that is not exactly zero beyond the bound."""
        return tuple(
            f"{name} beyond the bound of {self.bound:,} tokens are not zero: up to "
            f"{influence.beyond:.3g} over {influence.beyond_pairs:,} pairs of tokens"
            for name, influence in (("gradients", self.gradients), ("changes", self.changes))
            if influence.beyond is not None and influence.beyond > influence.allowed
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "bound": self.bound,
            "length": self.length,
            "sequences": self.sequences,
            "gradients": self.gradients.as_dict(),
            "changes": self.changes.as_dict(),
            "defects": list(self.defects),
        }


def measure(
    model: nn.Module,
    ids: Tensor,
    *,
    bound: int | None = None,
    places: int = PLACES,
    replaced: int = REPLACED,
    first: int = FIRST,
    sinks: int = 0,
    strict: bool = True,
    rounding: float = 0.0,
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> Reach:
    """The reach of `model` on some sequences, by gradients and by changes.

    Gradients are asked at `places` places of the second half of each sequence, the last among them,
    one forward and backward each. `replaced` tokens spread over each sequence are replaced, each by
    one drawn from the sequence itself, in batches. So memory is linear in the length where
    the model's attention is, and doesn't grow with the places.

    Args:
        model: of transformers, with a head, in eval mode, as it is or inside `attach(model,
            pattern=...)`; its weights are left as they are.
        ids: `(sequences, length)`, on the model's device.
        bound: the farthest distance possible (`attnspan.planner.reach.bound`); None: nothing is
            asserted.
        places: of each sequence, for gradients.
        replaced: tokens of each sequence.
        first: tokens at the start that are left out of all but `Influence.first`, and of what is
            asserted of changes.
        sinks: tokens at the start that the model, or its pattern, lets every query see: of these
            nothing beyond the bound is asserted. All others stay within it, for a sink sees nothing
            but what came before it.
        strict: raise where the influence beyond the bound isn't exactly zero; False leaves it to
            `Reach.defects`.
        rounding: divergence, in nats, that a change may make where it can't reach. Zero is right
            for all but mixtures of experts: there a matrix product has as many rows as tokens chose
            the expert, so that a token's last bits depend on tokens that it doesn't see.
        seed: of the replacements.
        report: is told how many forwards are done, and of how many.

    Raises:
        ValueError: the model is in training mode, or the sequences are too short.
        ArithmeticError: an influence beyond the bound, or one of a later token, is not zero, or
            some output is not finite.
    """
    if ids.dim() != 2 or ids.shape[1] < first + 4:
        raise ValueError(
            f"ids is {tuple(ids.shape)}; (sequences, length) with a length of at least {first + 4} "
            "is allowed"
        )
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if sinks > first:
        raise ValueError(f"sinks is {sinks}; up to first, {first}, are allowed")
    for name, count in (("places", places), ("replaced", replaced)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} is {count!r}; a whole number of at least 1 is allowed")
    length = ids.shape[1]
    queries = _spread(length // 2, length - 2, places)
    sources = _spread(first, length - 2, replaced)
    total, done = len(ids) * (len(queries) + len(sources) + 1), 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        if report is not None:
            report(done, total)

    gradients = Sums(length, bound, first, sinks)
    changes = Sums(length, bound, first, sinks, rounding)
    generator = torch.Generator().manual_seed(seed)
    with _frozen(model):
        for row in ids:
            for place in queries:
                values = gradient(model, row, place)
                if bool(values[place + 1 :].any()):
                    raise ArithmeticError(
                        f"the token after place {place} has an influence on what comes before it: "
                        "the model isn't causal"
                    )
                # From the query backwards, so that an index is a distance.
                gradients.add_query(values[: place + 1].flip(0))
                told(1)
            others = _replacements(row, sources, generator)
            for place, values in changed(model, row, others, told, rounding):
                changes.add_source(place, values)
    found = Reach(bound, length, len(ids), gradients.influence(), changes.influence())
    if strict and found.defects:
        raise ArithmeticError("; ".join(found.defects))
    return found


def gradient(model: nn.Module, ids: Tensor, place: int) -> Tensor:
    """The norms of d log p(ids[place + 1] | ids[..place]) / d embedding of each token, `(n,)`.

    float64, on the CPU.
    """
    embeddings = model.get_input_embeddings()(ids[None]).detach()  # type: ignore[operator]
    embeddings.requires_grad_(True)
    with torch.enable_grad():
        logits = model(
            inputs_embeds=embeddings,
            use_cache=False,
            logits_to_keep=torch.tensor([place], device=ids.device),
        ).logits[0, 0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = wide.log_softmax(-1)[ids[place + 1]]
    (grad,) = torch.autograd.grad(chosen, embeddings)
    norms = grad[0].double().norm(dim=-1).cpu()
    if not bool(norms.isfinite().all()):
        raise ArithmeticError(f"a gradient at place {place} is not finite")
    return norms


def changed(
    model: nn.Module,
    ids: Tensor,
    others: Sequence[tuple[int, int]],
    told: Callable[[int], None] = lambda count: None,
    rounding: float = 0.0,
) -> Iterator[tuple[int, Tensor]]:
    """For each (place, other id) the divergence at every i >= place once that token is replaced.

    KL(before || after) in nats, float64, index 0 at the place itself. Before and after are the same
    row of two batches of one shape, since the bits of a row may depend on where it lies.
    """
    budget = _CUDA_TOKENS if ids.is_cuda else _CPU_TOKENS
    rows = max(1, min(len(others), budget // len(ids)))
    with torch.inference_mode():
        before = model(input_ids=ids.expand(rows, -1).contiguous(), use_cache=False).logits
        told(1)
        for start in range(0, len(others), rows):
            some = others[start : start + rows]
            batch = ids.repeat(rows, 1)
            for row, (place, other) in enumerate(some):
                batch[row, place] = other
            after = model(input_ids=batch, use_cache=False).logits
            for row, (place, _) in enumerate(some):
                earlier = _divergence(before[row, :place], after[row, :place])
                if len(earlier) and float(earlier.max()) > rounding:
                    raise ArithmeticError(
                        f"replacing the token at {place} changes what comes before it: the model "
                        "isn't causal, or its kernels give other bits each time"
                    )
                yield place, _divergence(before[row, place:], after[row, place:])
            told(len(some))


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL of each row, `(n, vocabulary)` to `(n,)`; zero exactly where the logits are the same."""
    parts: list[Tensor] = []
    # Some rows at a time: float64 of a large vocabulary is more than the model's own output.
    for a, b in zip(before.split(64), after.split(64), strict=True):
        ours = a.double().log_softmax(-1)
        gap = b.double().log_softmax(-1) - ours
        # sum p * -gap; since sum p * exp(gap) = 1, this is the same without its cancellation.
        parts.append((ours.exp() * (gap.expm1() - gap)).sum(-1))
    values = torch.cat(parts).cpu()
    if not bool(values.isfinite().all()):
        raise ArithmeticError("a divergence is not finite: the model's output is broken")
    return values


def _spread(start: int, stop: int, count: int) -> list[int]:
    """Up to `count` whole numbers from `start` to `stop`, both included, evenly spaced.

    >>> _spread(4, 10, 3), _spread(4, 5, 3), _spread(3, 9, 1)
    ([4, 7, 10], [4, 5], [9])
    """
    count = min(count, stop - start + 1)
    if count == 1:
        return [stop]
    return [start + i * (stop - start) // (count - 1) for i in range(count)]


def _replacements(
    ids: Tensor, places: Sequence[int], generator: torch.Generator
) -> list[tuple[int, int]]:
    """Another token of the same sequence for each place: one that the text does use."""
    kinds = ids.unique().tolist()
    if len(kinds) < 2:
        raise ValueError("ids holds one kind of token alone; two or more are needed")
    chosen: list[tuple[int, int]] = []
    for place in places:
        present = int(ids[place])
        others = [kind for kind in kinds if kind != present]
        chosen.append((place, others[int(torch.randint(len(others), (), generator=generator))]))
    return chosen


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """For the block's length no weight takes a gradient, whose graph would hold all activations."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def __getattr__(name: str) -> Any:
    """`bound`, which lives in `attnspan.planner.reach`: a name of this module would be hidden by
    the argument of `measure`."""
    if name == "bound":
        from attnspan.planner.reach import bound

        return bound
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
