"""`with attach(model, ring=...)`: a model's forward and backward, one sequence over many processes.

Every process calls the model with the whole sequence; inside, each keeps the tokens that the ring's
layout gives it, and attention goes through `ring_attention`.

Gradients. Of N processes, r computes the loss of its own tokens, l_r = (sum of their cross
entropies) / C, where C counts the targets of the whole sequence that aren't ignored. What a call
returns is L = l_0 + ... + l_(N-1), the same number everywhere, and backward starts from N * l_r.
So the mean over the ring of a parameter's gradients, (1 / N) * sum over r of N * dl_r, is dL: what
one process has. DDP and FSDP2 take means, so they need nothing else, be they spread over the ring,
over the rows of a batch, or over both. DeepSpeed's and Megatron's context parallelism scale alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from attnspan.models.anatomy import device_of, refuse_unknown, text_config
from attnspan.models.interface import CACHE_NAMES, Carrier, Interface, Refused, restore_forward
from attnspan.models.patterned import Patterns, cast, per_layer
from attnspan.models.ring_probe import Found, ending_at, examine, rotary
from attnspan.patterns import Documents, Pattern
from attnspan.patterns.atoms import Distance, Segments, Stride, atoms
from attnspan.patterns.tiles import pairs
from attnspan.ring.attention import ring_attention
from attnspan.ring.groups import transport_of
from attnspan.ring.layout import Contiguous, Layout, Ring, ZigZag
from attnspan.ring.transport import RingMismatch, Transport

Rows = tuple[tuple[int, ...], ...]
"""For each row of a batch, the lengths of its documents."""

BY = "attach(model, ring=...)"
TAKEN = (
    *("input_ids", "inputs_embeds", "position_ids", "attention_mask"),
    *("labels", "shift_labels", "num_items_in_batch"),
)
FACTS = ("input_ids", "inputs_embeds", "position_ids", "labels", "num_items_in_batch")


@dataclass(frozen=True)
class _Shard(Carrier):
    """What attends in a forward; it travels in the place of a mask, as `patterned.Rows` does."""

    rows: Rows


@dataclass(frozen=True)
class _Whole:
    """A call's tensors, which are the same on every rank; `targets` are shifted labels."""

    name: str
    tokens: Tensor
    positions: Tensor | None
    targets: Tensor | None
    items: Tensor | float | None
    rows: Rows

    def facts(self) -> dict[str, str]:
        ids, embeds = (self.tokens, None) if self.name == "input_ids" else (None, self.tokens)
        return {
            "input_ids": _checksum(ids),
            # Many bytes, whose sums tell as well whether they are the same.
            "inputs_embeds": _checksum(
                None if embeds is None else embeds.detach().double().sum(-1)
            ),
            "position_ids": _checksum(self.positions),
            "labels": _checksum(self.targets),
            "num_items_in_batch": "None" if self.items is None else f"{float(self.items):.9g}",
        }


@contextmanager
def ringed(model: nn.Module, pattern: Patterns | None, ring: Any) -> Iterator[nn.Module]:
    """For the block's length, `model` computes this process's shard of each sequence.

    Raises:
        ValueError: where the pattern doesn't fit the model's layers, or the model can't be done
            exactly; one sentence says why, on every rank alike.
        TypeError: where `ring` or `pattern` is none of what `attach` allows.
    """
    if not isinstance(ring, Ring | ProcessGroup | DeviceMesh | Transport):
        raise TypeError(
            f"ring is a {type(ring).__name__}; an attnspan.Ring, a process group or a DeviceMesh "
            "of one dimension is allowed"
        )
    given = ring if isinstance(ring, Ring) else Ring(group=ring)
    transport = transport_of(given.group, given.deadline, device_of(model))
    interface = Interface(model)
    facts: dict[str, str] = {}
    error, run, found = None, None, None
    try:
        config = text_config(model)
        found = examine(model, interface)
        if pattern is None:
            patterns = found.own_patterns(config)
        else:
            kinds = getattr(config, "layer_types", None)
            patterns = per_layer(pattern, config.num_hidden_layers, kinds)
        if not isinstance(ring, Ring):
            given = replace(given, layout=_layout_for(patterns))
        run = _Run(model, given, transport, patterns, found.no_loss)
        facts = {"pattern": str([str(each) for each in patterns]), "ring": _text(given)}
    except (TypeError, ValueError) as caught:
        error = caught
    _agree(transport, error, facts, ("pattern", "ring"))
    assert run is not None
    assert found is not None
    _agree_on_weights(transport, found)
    with run.installed(interface):
        yield model


def _agree(
    transport: Transport, error: Exception | None, facts: dict[str, str], names: tuple[str, ...]
) -> None:
    """Raises on every rank alike, whether one alone refuses its arguments or all do."""
    transport.layer = None
    verdict = f"refused ({error})" if error else "accepted"
    told = {name: facts.get(name, "None") for name in names}
    transport.agree({"arguments": verdict} | told, BY)
    if error is not None:
        raise error


def _agree_on_weights(transport: Transport, found: Found) -> None:
    """Refuses models that answer the same few tokens differently: each would train its own."""
    answers = transport.gather(found.sample.float(), "the probe's logits")
    allowed = torch.finfo(found.sample.dtype).eps ** 0.5 * float(answers.abs().max())
    for rank, off in enumerate((answers - answers[0]).abs().amax(-1).tolist()):
        if not off <= allowed:
            raise RingMismatch(
                f"{BY}: the models of ranks 0 and {rank} give other logits for the same tokens (off"
                f" by {off:.2g}); the same weights on every rank are allowed"
            )


def _layout_for(patterns: tuple[Pattern, ...]) -> Layout:
    """The layout of a bare group.

    Windows alone are even work however they lie, and in one piece they need half the halo.
    """
    far = 2**20
    seen = [pairs(each, 1, far + 1, far) for each in dict.fromkeys(patterns)]
    return Contiguous() if all(0 < count < far // 8 for count in seen) else ZigZag()


def _text(ring: Ring) -> str:
    return f"{ring.layout}, schedule {ring.schedule!r}, wire {ring.wire!r}"


def _checksum(x: Tensor | None) -> str:
    if x is None:
        return "None"
    return f"{tuple(x.shape)} with checksum {crc32(x.cpu().numpy().tobytes()):08x}"


class _Run:
    """One attachment of a model to a ring."""

    def __init__(
        self,
        model: nn.Module,
        ring: Ring,
        transport: Transport,
        patterns: tuple[Pattern, ...],
        no_loss: str | None,
    ) -> None:
        self.model, self.ring, self.transport = model, ring, transport
        self.patterns, self.no_loss = patterns, no_loss
        self.options = ring.options() | {"group": transport}

    @contextmanager
    def installed(self, interface: Interface) -> Iterator[None]:
        forward, before = self.model.forward, self.model.__dict__.get("forward")
        names = list(inspect.signature(forward).parameters)

        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs |= dict(zip(names, args, strict=False))
            whole, error = None, None
            try:
                whole = self._read(kwargs)
            except (TypeError, ValueError) as caught:
                error = caught
            facts = {} if whole is None else whole.facts()
            _agree(self.transport, error, facts, FACTS)
            assert whole is not None
            latest = whole.tokens.shape[1] - 1
            if whole.positions is not None:
                latest = int(whole.positions.max())
            carrier = _Shard(self._attend, whole.rows)
            with interface.masked(carrier), ending_at(latest):
                output = forward(**self._shard(whole, kwargs))
            return output if whole.targets is None else self._with_loss(output)

        with interface.diverted(_outside, rotary):
            self.model.__dict__["forward"] = call
            self.model.__dict__["_attnspan_pattern"] = self.patterns
            try:
                yield
            finally:
                del self.model.__dict__["_attnspan_pattern"]
                restore_forward(self.model, before)

    def _read(self, kwargs: dict[str, Any]) -> _Whole:
        """A call's tensors, checked without any exchange."""
        self._refuse(kwargs)
        name = "inputs_embeds" if kwargs.get("input_ids") is None else "input_ids"
        tokens = kwargs.get(name)
        if name == "input_ids" and kwargs.get("inputs_embeds") is not None:
            raise ValueError("input_ids and inputs_embeds are given; one of them is allowed")
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 + (name == "inputs_embeds"):
            raise ValueError(f"{name} is {_shape(tokens)}; the whole (batch, n) is allowed")
        batch, n = tokens.shape[:2]
        self.ring.layout.chunks(n, self.transport.size)  # which raises where n doesn't divide
        _check_mask(kwargs.get("attention_mask"), batch, n)
        positions = kwargs.get("position_ids")
        if positions is not None and (
            not isinstance(positions, Tensor) or positions.shape not in ((1, n), (batch, n))
        ):
            raise ValueError(
                f"position_ids is {_shape(positions)}; {(batch, n)}, or {(1, n)}, is allowed"
            )
        return _Whole(
            name,
            tokens,
            positions,
            self._targets(kwargs, batch, n),
            kwargs.get("num_items_in_batch"),
            self._rows(positions, batch, n),
        )

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        given = [name for name in CACHE_NAMES if kwargs.get(name) is not None]
        if given or kwargs.get("use_cache"):
            raise ValueError(
                f"{(*given, 'use_cache')[0]} is given; a ring keeps no keys and values from call "
                "to call, and whole sequences without a cache are allowed"
            )
        keep = kwargs.get("logits_to_keep")
        if isinstance(keep, Tensor) or keep:
            raise ValueError(
                f"logits_to_keep is {'a tensor' if isinstance(keep, Tensor) else keep}; in a ring "
                "every rank gives its own tokens' logits, and 0 is allowed"
            )
        for name in ("output_attentions", "output_router_logits"):
            value = kwargs.get(name)
            if value if value is not None else getattr(self.model.config, name, False):
                raise ValueError(
                    f"{name} is True; in a ring no rank has them, and False is allowed"
                )
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and name not in TAKEN and name != "logits_to_keep":
                raise ValueError(
                    f"{name} is given, and a ring doesn't know how its tokens lie; "
                    f"{', '.join(TAKEN)} are allowed"
                )

    def _targets(self, kwargs: dict[str, Any], batch: int, n: int) -> Tensor | None:
        """What each token is to predict: labels, shifted over the whole sequence."""
        shifted = kwargs.get("shift_labels")
        name = "labels" if shifted is None else "shift_labels"
        labels = kwargs.get(name)
        if labels is None:
            return None
        if self.no_loss is not None:
            raise ValueError(f"{name} is given, and {self.no_loss}; compute the loss from logits")
        if not isinstance(labels, Tensor) or labels.shape != (batch, n):
            raise ValueError(f"{name} is {_shape(labels)}; {(batch, n)} is allowed")
        if shifted is not None:
            return shifted
        return nn.functional.pad(labels, (0, 1), value=_ignored(kwargs))[:, 1:]

    def _rows(self, positions: Tensor | None, batch: int, n: int) -> Rows:
        """The documents that positions tell: where they don't count on, another begins."""
        if positions is None:
            return ((n,),) * batch
        breaks = (positions.diff(dim=-1) != 1).cpu().numpy()
        edges = [np.flatnonzero(row) + 1 for row in breaks]
        rows = tuple(tuple(np.diff(e, prepend=0, append=n).tolist()) for e in edges)
        for pattern in dict.fromkeys(self.patterns) if max(map(len, rows)) > 1 else ():
            _within(pattern, max(rows, key=len))
        return rows * (batch // len(rows))

    def _shard(self, whole: _Whole, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of this rank's own forward."""
        transport, n = self.transport, whole.tokens.shape[1]
        at = self.ring.layout.positions(n, transport.rank, transport.size)
        index = torch.from_numpy(at).to(whole.tokens.device)
        local = {name: value for name, value in kwargs.items() if name not in TAKEN}
        local[whole.name] = whole.tokens.index_select(1, index)
        places = whole.positions
        local["position_ids"] = index[None] if places is None else places.index_select(1, index)
        local["use_cache"] = False
        if whole.targets is not None:
            mine = whole.targets.index_select(1, index)
            count = (
                (whole.targets != _ignored(kwargs)).sum() if whole.items is None else whole.items
            )
            local |= {"labels": mine, "shift_labels": mine, "num_items_in_batch": count}
        return local

    def _with_loss(self, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_WholeLoss.apply(output[0], self.transport), *output[1:])
        output["loss"] = _WholeLoss.apply(output["loss"], self.transport)
        return output

    def _attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: _Shard,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        refuse_unknown(kwargs)
        layer: Any = module.layer_idx
        options = {"scale": scaling, "softcap": softcap, "sink_logits": s_aux, "layer": layer}
        options |= self.options
        pattern, rows = self.patterns[layer], mask.rows
        with cast(q, k, v) as (q, k, v):
            if len(set(rows)) == 1:
                return ring_attention(q, k, v, _within(pattern, rows[0]), **options)
            single = []
            for b, row in enumerate(rows):
                q_row, k_row, v_row = (x[b : b + 1] for x in (q, k, v))
                single.append(ring_attention(q_row, k_row, v_row, _within(pattern, row), **options))
            return torch.cat(single)


class _WholeLoss(torch.autograd.Function):
    """The sum of the ranks' parts; backward starts with `size` times each (see the module)."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, transport: Transport) -> Tensor:
        ctx.size = transport.size
        transport.layer = None
        return transport.gather(part.detach().reshape(1), "the loss").sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.size, None


@lru_cache(64)
def _within(pattern: Pattern, lengths: tuple[int, ...]) -> Pattern:
    """`pattern` inside of each document alone."""
    if len(lengths) == 1:
        return pattern
    if not all(isinstance(atom, Distance | Stride | Segments) for atom in atoms(pattern.rule())):
        raise ValueError(
            f"position_ids restart, and {pattern} has tokens that count from the start of the whole"
            " sequence; patterns by distance, such as SlidingWindow, and Documents are allowed"
        )
    return pattern & Documents(lengths, causal=False)


def _ignored(kwargs: dict[str, Any]) -> int:
    return kwargs.get("ignore_index", -100)


def _check_mask(mask: Any, batch: int, n: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.shape != (batch, n):
        raise ValueError(f"attention_mask is {_shape(mask)}; None, or {(batch, n)}, is allowed")
    if not mask.bool().all():
        raise ValueError(
            "attention_mask marks padding, which a ring doesn't leave out; None is allowed (pad to "
            "the right and set those labels to -100: no token looks there)"
        )


def _shape(x: Any) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else f"a {type(x).__name__}"


def _outside(*args: Any, **kwargs: Any) -> Tensor:
    raise Refused("a part of the model is called; in a ring the model that was attached is allowed")
