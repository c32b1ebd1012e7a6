"""What the prefill of a whole model costs on a ring of devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum

from attnspan.patterns.algebra import Pattern
from attnspan.patterns.library import Causal, SlidingWindow
from attnspan.planner.forms import works
from attnspan.planner.links import LINKS, Link, Machine
from attnspan.planner.ring import Cost, Heads, choose, cost
from attnspan.planner.spec import ModelSpec
from attnspan.planner.work import Work

WEIGHTS = ("bf16", "fp8")
HIDDEN = 0.01  # of the time: communication that is exposed for less counts as hidden


@dataclass(frozen=True)
class Prefill:
    """The prefill of one sequence.

    Attributes:
        devices: all of them.
        schedule: of the attention.
        seconds: attention, linear layers and what tensor parallelism adds.
        attention: seconds, exposed communication included.
        linear: seconds of the matrix products.
        tensor: seconds of tensor parallelism's sums, none of them hidden.
        communication: seconds in which the attention's exchanges are under way.
        exposed: those in which nothing is computed.
        sent: bytes that a device sends for attention, the mean of all.
        memory: most bytes of a device: weights, cache, activations, what the schedule holds.
        weights: bytes of weights of a device.
        cache: bytes of keys and values of a device.
        imbalance: of the attention's pairs.
        copies: as in `Cost`.
        fits: whether `memory` fits the device; None: its memory isn't known.
    """

    devices: int
    schedule: str
    seconds: float
    attention: float
    linear: float
    tensor: float
    communication: float
    exposed: float
    sent: int
    memory: int
    weights: int
    cache: int
    imbalance: float
    copies: int
    fits: bool | None

    @property
    def overlap(self) -> float:
        """The share of the attention's communication that is hidden; 1 where there is none."""
        return 1 - self.exposed / self.communication if self.communication else 1.0

    @property
    def hides(self) -> bool:
        """Whether less than a hundredth of the time is communication that nothing hides."""
        return self.exposed < HIDDEN * self.seconds


class Simulation:
    """One model, context and machine, for any number of devices and schedule.

    Args:
        spec: the model.
        context: tokens.
        machine: devices, and the link between the ring's ranks.
        pattern: of all layers, or one for each; None: causal, within the windows that the model
            has.
        layout: "contiguous", "zigzag" or "striped".
        tensor: devices among which each rank of the ring splits heads and weights.
        weights: "bf16", or "fp8": feed-forward weights of one byte, multiplied at twice the rate.
        inner: the link between those `tensor` devices.

    Attributes:
        heads: of a rank of the ring.
        patterns: (layers, pattern), each pattern once.
        exact: False where a stride makes figures estimates.

    Raises:
        ValueError: heads that can't be split so, a model whose attention has latent, chunked or
            shared keys and values, or as in `attnspan.planner.forms.work`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        context: int,
        machine: Machine,
        *,
        pattern: Pattern | Sequence[Pattern] | None = None,
        layout: str = "zigzag",
        tensor: int = 1,
        weights: str = "bf16",
        inner: Link = LINKS["nvlink"],
    ) -> None:
        if weights not in WEIGHTS:
            raise ValueError(f"weights {weights!r}; allowed are {', '.join(WEIGHTS)}")
        if spec.heads % tensor or (spec.kv_heads % tensor and tensor % spec.kv_heads):
            raise ValueError(
                f"tensor-parallel is {tensor}; {spec.name} has {spec.heads} query heads and "
                f"{spec.kv_heads} KV heads, and whole heads for each device are allowed"
            )
        for part, there in (
            ("multi-head latent attention", spec.latent is not None),
            ("attention in chunks", spec.chunked),
            ("layers that read other layers' keys and values", bool(spec.shares)),
        ):
            if there:
                raise ValueError(f"model {spec.name} has {part}; a ring of that isn't simulated")
        self.spec, self.context, self.machine = spec, context, machine
        self.tensor, self.weights, self.inner = tensor, weights, inner
        self.heads = Heads(spec.heads // tensor, max(1, spec.kv_heads // tensor), spec.head_dim)
        patterns = (
            [Causal() if w is None else SlidingWindow(w) for w in spec.windows]
            if pattern is None
            else [pattern] * spec.layers
            if isinstance(pattern, Pattern)
            else list(pattern)
        )
        self.patterns = [(count, each) for each, count in Counter(patterns).items()]
        self._layers = [(count, works(each, context, layout)) for count, each in self.patterns]
        self.exact = all(of(1).exact for _, of in self._layers)

    def ranks(self, devices: int) -> int:
        """Of the ring.

        Raises:
            ValueError: `devices` is no multiple of those of a rank.
        """
        if devices % self.tensor:
            raise ValueError(
                f"devices is {devices}; with tensor-parallel {self.tensor} a multiple of it is "
                "allowed"
            )
        return devices // self.tensor

    def choose(self, devices: int) -> str:
        """The schedule that takes the fewest seconds in the kind of layer that takes the most."""
        size = self.ranks(devices)

        def seconds(layer: tuple[int, Callable[[int], Work]]) -> float:
            return layer[0] * cost("ring", layer[1], size, self.heads, self.machine).seconds

        heaviest = max(self._layers, key=seconds)
        return choose(heaviest[1], size, self.heads, self.machine).schedule

    def prefill(self, devices: int, schedule: str) -> Prefill:
        """What so many devices take.

        Raises:
            ValueError: as in `ranks` and `attnspan.planner.ring.cost`.
        """
        spec, size = self.spec, self.ranks(devices)
        costs = [
            (count, cost(schedule, of, size, self.heads, self.machine))
            for count, of in self._layers
        ]

        def total(field: Callable[[Cost], float]) -> float:
            return fsum(count * field(each) for count, each in costs)

        tokens = -(-self.context // size)
        linear, tensor = self._linear(tokens)
        attention = total(lambda c: c.seconds)
        weights, cache = self._weights(), spec.layers * self.heads.kv_bytes * tokens
        memory = weights + cache + self._activations(tokens) + max(c.extra for _, c in costs)
        limit = self.machine.device.memory
        return Prefill(
            devices=devices,
            schedule=schedule,
            seconds=attention + linear + tensor,
            attention=attention,
            linear=linear,
            tensor=tensor,
            communication=total(lambda c: c.communication),
            exposed=total(lambda c: c.exposed),
            sent=round(total(lambda c: c.sent)),
            memory=memory,
            weights=weights,
            cache=cache,
            imbalance=max(c.imbalance for _, c in costs),
            copies=max(c.copies for _, c in costs),
            fits=None if limit is None else memory <= limit,
        )

    def _linear(self, tokens: int) -> tuple[float, float]:
        """Seconds of the products, and of the two sums of a layer over `tensor` devices."""
        spec = self.spec
        # A weight of one byte is multiplied in half the time.
        fewer = spec.active_feed_forward / 2 if self.weights == "fp8" else 0
        weighted = spec.linear_parameters - fewer
        products = 2 * weighted * tokens / self.tensor / self.machine.device.linear
        if self.tensor == 1:
            return products, 0.0
        each = 2 * (self.tensor - 1) / self.tensor * tokens * spec.hidden * 2
        sums = 2 * spec.layers * (self.inner.latency + each / self.inner.bandwidth)
        return products, sums

    def _weights(self) -> int:
        """Bytes on a device: each rank of the ring holds them all, over its `tensor` devices."""
        fewer = self.spec.feed_forward if self.weights == "fp8" else 0
        return -(-(2 * self.spec.parameters - fewer) // self.tensor)

    def _activations(self, tokens: int) -> int:
        """Bytes of a layer at its widest: the residual stream, its norm, and the larger of the
        attention's q, k, v and output and the feed-forward's two inner halves."""
        attention = (2 * self.heads.query + 2 * self.heads.kv) * self.heads.dim
        inner = 2 * -(-self.spec.inner_width // self.tensor)
        return 2 * tokens * (2 * self.spec.hidden + max(attention, inner))
