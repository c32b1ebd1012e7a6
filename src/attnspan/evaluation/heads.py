"""What each head attends to: the first tokens, the nearest, or what followed an earlier copy.

Attention weights are made block by block of queries in the model's own attention call, so memory is
linear in the tokens, and the output that goes on through the model is the one of these weights:
what is reported is what the model ran with. The result is held against the untouched model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnspan.models.anatomy import anatomy_of, refuse_unknown
from attnspan.models.interface import Interface, Refused, full_precision
from attnspan.policies import PerHead, PerLayer, Policy

FIRST = 4
"""Tokens at the start that count as sinks, as in StreamingLLM (https://arxiv.org/abs/2309.17453)."""

SINK = 0.3
"""Mean attention on token 0 above which a head is a sink head: the threshold of Gu et al., "When
attention sink emerges in language models" (https://arxiv.org/abs/2410.10781)."""

START = 64
"""Queries count from here on, or from half of a shorter sequence or of the layer's window: with
fewer keys, a share of any one of them says little."""

NEAR = 16
"""A local head looks at the nearest sixteenth of the sequence, at least `LEAST_NEAR` tokens."""

LEAST_NEAR = 16

LOCAL = 0.9
"""Share of a head's attention, the first tokens left out, that must lie near for a local head."""

COPY_SHARE = 0.1
"""Share of copied tokens at which a head's most attended key is the one to copy, above which it is
a retrieval head: the threshold of Wu et al., "Retrieval head mechanistically explains long-context
factuality" (https://arxiv.org/abs/2404.15574). Theirs is measured on answers in a haystack, this on
a block of random tokens that comes twice."""

_BLOCK = 64


@dataclass(frozen=True)
class Heads:
    """Figures of each head of each layer; a `Tensor` is `(layers, heads)`, float64, on the CPU.

    Attributes:
        token0: mean attention on token 0, of queries that may see it.
        first: the same on the first `FIRST` tokens together.
        near: the share of the other attention that lies on the nearest `window` keys.
        learned: mean mass that a learned sink logit takes (gpt-oss's `s_aux`), which no key has.
        copy: the share of tokens of a block's second coming at which the most attended key, the
            first tokens left out, is the one that followed the first copy.
        window: keys that count as near.
        length: tokens of a sequence.
        queries: how many queries of each layer `token0` is the mean over.
    """

    token0: Tensor
    first: Tensor
    near: Tensor
    learned: Tensor
    copy: Tensor
    window: int
    length: int
    queries: tuple[int, ...]

    @property
    def sinks(self) -> Tensor:
        return self.token0 > SINK

    @property
    def retrieval(self) -> Tensor:
        return self.copy >= COPY_SHARE

    @property
    def local(self) -> Tensor:
        return (self.near >= LOCAL) & ~self.retrieval

    def retrieving(self, kv_heads: int) -> Tensor:
        """KV heads some query head of which retrieves: bool `(layers, kv_heads)`."""
        return self.retrieval.unflatten(1, (kv_heads, -1)).any(-1)

    def policy(self, kv_heads: int, far: Policy, near: Policy) -> PerLayer:
        """`far` where a KV head retrieves and `near` where it doesn't, as in DuoAttention.

        DuoAttention (https://arxiv.org/abs/2410.10819) finds its heads by training a gate for each;
        here it is by what they attend to.
        """

        def of(layer: list[bool]) -> Policy:
            each = tuple(far if yes else near for yes in layer)
            return PerHead(each) if len(set(each)) > 1 else each[0]

        return PerLayer(tuple(map(of, self.retrieving(kv_heads).tolist())))

    def as_dict(self) -> dict[str, Any]:
        def listed(kinds: Tensor) -> list[list[int]]:
            return kinds.nonzero().tolist()

        def rounded(values: Tensor) -> list[list[float]]:
            return [[round(x, 6) for x in row] for row in values.tolist()]

        return {
            "token0": rounded(self.token0),
            "first_tokens": rounded(self.first),
            "near": rounded(self.near),
            "near_window": self.window,
            "learned_sink": rounded(self.learned),
            "copy": rounded(self.copy),
            "mean_token0": float(self.token0.mean()),
            "mean_first_tokens": float(self.first.mean()),
            "mean_learned_sink": float(self.learned.mean()),
            "sink_share": float(self.sinks.double().mean()),
            "sink_heads": listed(self.sinks),
            "local_heads": listed(self.local),
            "retrieval_heads": listed(self.retrieval),
            "length": self.length,
            "queries": list(self.queries),
        }


def measure(
    model: nn.Module, texts: Sequence[Tensor], *, bos: int | None = None, seed: int = 0
) -> Heads:
    """What each head attends to on some texts, and on a block of random tokens that comes twice.

    Args:
        model: of transformers, in eval mode, not attached.
        texts: ids of one length each, `(length,)`, on the model's device, BOS first if the model
            has one.
        bos: put before the random block.
        seed: of the block, whose tokens are drawn from those of the texts.

    Raises:
        ValueError: the model can't be done exactly, or the texts are too short.
    """
    length = len(texts[0])
    if length < 2 * FIRST + LEAST_NEAR:
        raise ValueError(
            f"texts have {length} tokens; {2 * FIRST + LEAST_NEAR} or more are needed to tell heads"
        )
    anatomy = anatomy_of(model)
    windows = [layer.sliding_window for layer in anatomy.layers]
    near = max(LEAST_NEAR, length // NEAR)
    sums = [_Sums(window, near, length) for window in windows]
    for ids in texts:
        _run(model, ids, windows, [each.text for each in sums])
    block = _repeated(torch.cat(list(texts)), length, bos, seed)
    half = len(block) // 2
    target = [each.copies(half, bos is not None) for each in sums]
    _run(model, block, windows, target, check=False)
    return Heads(
        torch.stack([each.token0 / max(1, each.seen) for each in sums]),
        torch.stack([each.first / max(1, each.seen) for each in sums]),
        torch.stack([each.nearby / each.rest.clamp(min=1e-30) for each in sums]),
        torch.stack([each.learned / max(1, each.all) for each in sums]),
        torch.stack([each.copied / max(1, each.copyable) for each in sums]),
        near,
        length,
        tuple(each.seen for each in sums),
    )


def _repeated(ids: Tensor, length: int, bos: int | None, seed: int) -> Tensor:
    """BOS, and a block of tokens twice; at most `length` together."""
    kinds = ids.unique()
    if bos is not None:
        kinds = kinds[kinds != bos]
    half = (length - (bos is not None)) // 2
    generator = torch.Generator().manual_seed(seed)
    block = kinds[torch.randint(len(kinds), (half,), generator=generator).to(kinds.device)]
    start = block[:0] if bos is None else block.new_tensor([bos])
    return torch.cat((start, block, block))


class _Sums:
    """What is added up of one layer."""

    def __init__(self, window: int | None, near: int, length: int) -> None:
        self.window, self.near_window = window, near
        self.start = min(START, min(length, window or length) // 2)
        self.token0: Any = 0.0
        self.first: Any = 0.0
        self.nearby: Any = 0.0
        self.rest: Any = 0.0
        self.learned: Any = 0.0
        self.copied: Any = 0.0
        self.seen = self.all = self.copyable = 0

    def text(self, weights: Tensor, learned: Tensor, start: int) -> None:
        """Takes in the weights of queries from `start` on, `(heads, m, keys)`.

        `learned` is the mass of a learned sink, `(heads, m)`.
        """
        n, keys = weights.shape[1], weights.shape[2]
        places = torch.arange(start, start + n, device=weights.device)
        late = places >= self.start
        # Where a window has left token 0 behind, that it gets nothing says nothing of the head.
        seeing = late if self.window is None else late & (places < self.window)
        if bool(seeing.any()):
            seen = weights[:, seeing]
            self.token0 += seen[..., 0].double().sum(1).cpu()
            self.first += seen[..., :FIRST].double().sum((1, 2)).cpu()
            self.seen += int(seeing.sum())
        weights, places = weights[:, late], places[late]
        self.learned += learned[:, late].double().sum(1).cpu()
        self.all += len(places)
        column = torch.arange(keys, device=weights.device)
        rest = column >= FIRST
        close = rest & (places[:, None] - column < self.near_window)
        self.rest += (weights * rest).double().sum((1, 2)).cpu()
        self.nearby += (weights * close).double().sum((1, 2)).cpu()

    def copies(self, half: int, bos: bool) -> Any:
        """What takes in the weights over a block that comes twice."""

        def take(weights: Tensor, learned: Tensor, start: int) -> None:
            n = weights.shape[1]
            places = torch.arange(start, start + n, device=weights.device)
            # The last token of the second copy has nothing to copy, and the first tokens are left
            # out, those to copy as well.
            first = max(half + bos, half - 1 + FIRST)
            second = (places >= first) & (places < 2 * half + bos - 1)
            if not bool(second.any()):
                return
            most = weights[:, second].clone()
            most[..., :FIRST] = 0
            hit = most.argmax(-1) == places[second] - half + 1
            self.copied += hit.double().sum(1).cpu()
            self.copyable += int(second.sum())

        return take


def _run(
    model: nn.Module,
    ids: Tensor,
    windows: Sequence[int | None],
    takers: Sequence[Any],
    check: bool = True,
) -> None:
    """One forward whose weights, layer by layer and block by block, go to `takers`."""
    calls: list[int] = []

    def attend(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        refuse_unknown(kwargs)
        layer: Any = module.layer_idx
        calls.append(layer)
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        return _attend(q, k, v, scale, softcap, s_aux, windows[layer], takers[layer])

    interface = Interface(model)
    with torch.inference_mode(), full_precision(model):
        with interface.diverted(attend):
            got = model(input_ids=ids[None], use_cache=False)[0]
        if not check:
            return
        expected = model(input_ids=ids[None], use_cache=False)[0]
    error, scale = float((got - expected).abs().max()), max(1.0, float(expected.abs().max()))
    # Half the digits, as for a cache: far above rounding, far below a wrong mask or scale.
    allowed = torch.finfo(expected.dtype).eps ** 0.5 * scale
    if not error <= allowed:
        raise Refused(
            f"attention weights of model type {model.config.model_type!r} don't give its outputs "  # type: ignore[union-attr]
            f"(off by {error:.2g}, {allowed:.2g} is allowed), so its heads can't be told"
        )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
    window: int | None,
    take: Any,
) -> Tensor:
    """Causal attention of one row by its weights, `_BLOCK` queries at a time."""
    heads, n = q.shape[1], q.shape[2]
    groups = heads // k.shape[1]
    k, v = (x[0].float().repeat_interleave(groups, 0) for x in (k, v))
    column = torch.arange(n, device=q.device)
    out = torch.empty(1, heads, n, v.shape[-1], dtype=q.dtype, device=q.device)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        # Nothing after the block is seen by it.
        scores = q[0, :, start:stop].float() @ k[:, :stop].mT * scale
        if softcap:
            scores = (scores / softcap).tanh() * softcap
        distance = column[start:stop, None] - column[:stop]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        scores = scores.masked_fill(hidden, -torch.inf)
        learned = scores.new_zeros(heads, stop - start)
        if s_aux is None:
            weights = scores.softmax(-1)
        else:
            sink = s_aux.float().reshape(heads, 1, 1).expand(-1, stop - start, 1)
            both = torch.cat((scores, sink), -1).softmax(-1)
            weights, learned = both[..., :-1], both[..., -1]
        out[0, :, start:stop] = (weights @ v[:, :stop]).to(out.dtype)
        take(weights, learned, start)
    return out
