"""A window and a pooled memory: the Compressive Transformer (https://arxiv.org/abs/1911.05507)."""

from __future__ import annotations

from dataclasses import dataclass

from attnspan.policies.base import Decision, Held, Keep, Policy, Pool, check_count

POOLINGS = ("mean", "max", "most-used")


@dataclass(frozen=True)
class Compressive(Policy):
    """Sinks, a window, and tokens that left it pooled `rate` to one into `memory` slots.

    Groups are `rate` tokens that follow each other in the stream, counted from the sinks on; a
    group is pooled at the first grid point at which all of it has left the window, and the oldest
    pooled slots go once `memory` are full. Keys are pooled un-rotated (the mean of rotated keys
    would cancel the fast channels), and a pooled slot takes one position, its place in the cache
    between sinks and window: so no distance passes `capacity`, as in the paper, where a compressed
    memory counts as one place in the sequence.

    `pooling` is "mean", "max", "most-used" (the token with the most attention received, per KV
    head) or `rate` weights of a convolution, oldest token first, the same for every channel.
    SPEC: `compressive:window=512,memory=256,rate=4`, `...,pooling=most-used`,
    `...,pooling=conv(0.1/0.2/0.3/0.4)`.
    """

    window: int
    memory: int
    rate: int
    pooling: str | tuple[float, ...] = "mean"
    sinks: int = 4
    block: int = 64

    def __post_init__(self) -> None:
        check_count("compressive", "window", self.window, 1)
        check_count("compressive", "memory", self.memory, 1)
        check_count("compressive", "rate", self.rate, 1)
        check_count("compressive", "sinks", self.sinks, 0)
        check_count("compressive", "block", self.block, 1)
        if isinstance(self.pooling, str):
            if self.pooling not in POOLINGS:
                raise ValueError(
                    f"compressive: pooling is {self.pooling!r}; "
                    f"{', '.join(POOLINGS)} or conv(weight/weight/...) is allowed"
                )
        else:
            object.__setattr__(self, "pooling", tuple(float(w) for w in self.pooling))
            if len(self.pooling) != self.rate:
                raise ValueError(
                    f"compressive: pooling has {len(self.pooling)} convolution weights; "
                    f"as many as rate, {self.rate}, are allowed"
                )

    @property
    def leading(self) -> int:
        return self.sinks

    @property
    def needs_scores(self) -> bool:
        return self.pooling == "most-used"

    @property
    def capacity(self) -> int:
        return self.sinks + self.memory + (self.rate - 1) + (self.window - 1) + self.block

    def decide(self, held: Held) -> Decision:
        raw = min(self.sinks + held.memory, held.slots)
        groups = max(0, held.slots - (self.window - 1) - raw) // self.rate
        surplus = max(0, held.memory + groups - self.memory)
        dropped = min(surplus, held.memory)
        unpooled = surplus - dropped  # one block may bring more groups than the memory has slots
        pooled = raw + unpooled * self.rate
        end = raw + groups * self.rate
        return (
            Keep(0, min(self.sinks, held.slots)),
            Keep(self.sinks + dropped, raw) if raw > self.sinks else Keep(0, 0),
            Pool(pooled, groups - unpooled, self.rate, self.pooling),
            Keep(end, held.slots),
        )

    def __str__(self) -> str:
        spec = f"compressive:window={self.window},memory={self.memory},rate={self.rate}"
        if not isinstance(self.pooling, str):
            spec += f",pooling=conv({'/'.join(repr(w) for w in self.pooling)})"
        elif self.pooling != "mean":
            spec += f",pooling={self.pooling}"
        if self.sinks != 4:
            spec += f",sinks={self.sinks}"
        return spec + (f",block={self.block}" if self.block != 64 else "")
