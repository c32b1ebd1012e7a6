"""The oracle: the rules of policies and caches as a plain program, one token at a time, in float64.

Nothing here comes from the package but the policies' sizes. What is held is a Python list for each
KV head; a key's position is its place in that list; every query rotates every key anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnspan.policies import (
    Compressive,
    HeavyHitter,
    KeepAll,
    PerHead,
    Policy,
    SinkWindow,
    SnapKV,
    Window,
)


@dataclass
class Slot:
    position: int  # in the stream; of the last token for a pooled slot
    key: Tensor
    value: Tensor
    score: float = 0.0
    pooled: bool = False


def angles(place: int, dim: int, theta: float) -> Tensor:
    return torch.tensor([place * theta ** (-2 * i / dim) for i in range(dim // 2)]).double()


def turn(x: Tensor, place: int, theta: float) -> Tensor:
    """Rotates the pairs (i, i + dim/2) by the place's angles."""
    angle = angles(place, x.shape[-1], theta)
    low, high = x.chunk(2, -1)
    return torch.cat(
        (low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1
    )


@dataclass
class PlainLayer:
    """What one layer holds and what its queries see."""

    policy: Policy
    kv_heads: int
    theta: float
    seen: int = 0
    heads: list[list[Slot]] = field(default_factory=list)
    forget: int | None = None  # a mutation: drop this stream position as soon as it is held
    # A mutation: what stays is decided by the queries up to so many before those that count.
    late: int = 0

    def __post_init__(self) -> None:
        self.heads = [[] for _ in range(self.kv_heads)]

    def policy_of(self, head: int) -> Policy:
        return self.policy.policies[head] if isinstance(self.policy, PerHead) else self.policy

    def counts(self, policy: Policy) -> bool:
        """Whether the attention of the query at `seen` counts."""
        observed = policy.observed if isinstance(policy, SnapKV) else None
        left = policy.block - 1 - self.seen % policy.block  # queries to come in this block
        return observed is None or self.late <= left < observed + self.late

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q` (heads, dim), `k` and `v` (kv_heads, dim), un-rotated, of the next token."""
        groups = q.shape[0] // self.kv_heads
        out = torch.zeros_like(q)
        for h, held in enumerate(self.heads):
            counts = self.counts(self.policy_of(h))
            held.append(Slot(self.seen, k[h], v[h]))
            if self.forget is not None:
                held[:] = [s for s in held if s.position != self.forget or s is held[-1]]
            place = len(held) - 1
            for g in range(groups):
                query = turn(q[h * groups + g], place, self.theta)
                logits = [
                    float(query @ turn(slot.key, i, self.theta)) / math.sqrt(q.shape[-1])
                    for i, slot in enumerate(held)
                ]
                top = max(logits)
                weights = [math.exp(x - top) for x in logits]
                total = sum(weights)
                for slot, weight in zip(held, weights, strict=True):
                    slot.score += weight / total if counts else 0.0
                    out[h * groups + g] += weight / total * slot.value
        self.seen += 1
        self.heads = [
            held if self.seen % self.policy_of(h).block else self.kept(self.policy_of(h), held)
            for h, held in enumerate(self.heads)
        ]
        for h, held in enumerate(self.heads):
            policy = self.policy_of(h)
            if isinstance(policy, SnapKV) and self.seen % policy.block == 0:
                for slot in held:
                    slot.score = 0.0
        return out

    def kept(self, policy: Policy, held: list[Slot]) -> list[Slot]:
        match policy:
            case KeepAll():
                return held
            case Window(window=window):
                return [s for s in held if s.position > self.seen - window]
            case SinkWindow(sinks=sinks, window=window):
                return [s for s in held if s.position < sinks or s.position > self.seen - window]
            case HeavyHitter(heavy=heavy, window=window):
                recent = [s for s in held if s.position > self.seen - window]
                old = [s for s in held if s.position <= self.seen - window]
                best = sorted(old, key=lambda s: (-s.score, s.position))[:heavy]
                return sorted(best, key=lambda s: s.position) + recent
            case Compressive():
                return self.pooled(policy, held)
            case SnapKV(heavy=heavy, window=window, neighbours=reach):
                recent = [s for s in held if s.position > self.seen - window]
                old = [s for s in held if s.position <= self.seen - window]
                most = {
                    s.position: max(o.score for o in old[max(0, i - reach) : i + reach + 1])
                    for i, s in enumerate(old)
                }
                best = sorted(old, key=lambda s: (-most[s.position], s.position))[:heavy]
                return sorted(best, key=lambda s: s.position) + recent
        raise AssertionError(policy)

    def pooled(self, policy: Compressive, held: list[Slot]) -> list[Slot]:
        sinks = [s for s in held if s.position < policy.sinks]
        memory = [s for s in held if s.pooled]
        raw = [s for s in held if not s.pooled and s.position >= policy.sinks]
        while (
            len(raw) >= policy.rate and raw[policy.rate - 1].position <= self.seen - policy.window
        ):
            group, raw = raw[: policy.rate], raw[policy.rate :]
            keys = torch.stack([s.key for s in group])
            values = torch.stack([s.value for s in group])
            if policy.pooling == "mean":
                key, value = keys.mean(0), values.mean(0)
            elif policy.pooling == "max":
                key, value = keys.amax(0), values.amax(0)
            elif policy.pooling == "most-used":
                best = max(range(policy.rate), key=lambda i: group[i].score)
                key, value = keys[best], values[best]
            else:
                weights = torch.tensor(policy.pooling).double()[:, None]
                key, value = (keys * weights).sum(0), (values * weights).sum(0)
            memory = [*memory, Slot(group[-1].position, key, value, pooled=True)][-policy.memory :]
        return sinks + memory + raw

    def positions(self) -> list[list[int]]:
        return [[s.position for s in held] for held in self.heads]


class PlainLlama:
    """A Llama's forward in float64 from its weights, with `PlainLayer` for attention."""

    def __init__(self, model, policy: Policy | list[Policy]) -> None:
        config = model.config
        self.weights = {n: p.detach().double() for n, p in model.named_parameters()}
        policies = policy if isinstance(policy, list) else [policy] * config.num_hidden_layers
        theta = config.rope_parameters["rope_theta"]
        self.layers = [PlainLayer(p, config.num_key_value_heads, theta) for p in policies]
        self.heads, self.dim = config.num_attention_heads, config.head_dim
        self.eps = config.rms_norm_eps

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean() + self.eps) * self.weights[name]

    def step(self, token: int) -> Tensor:
        """Logits `(vocabulary,)` after one more token."""
        w = self.weights
        x = w["model.embed_tokens.weight"][token]
        for i, layer in enumerate(self.layers):
            name = f"model.layers.{i}."
            y = self.norm(x, f"{name}input_layernorm.weight")
            q, k, v = (
                (w[f"{name}self_attn.{p}_proj.weight"] @ y).view(-1, self.dim) for p in "qkv"
            )
            x = x + w[f"{name}self_attn.o_proj.weight"] @ layer.step(q, k, v).flatten()
            y = self.norm(x, f"{name}post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(w[f"{name}mlp.gate_proj.weight"] @ y)
            x = x + w[f"{name}mlp.down_proj.weight"] @ (gate * (w[f"{name}mlp.up_proj.weight"] @ y))
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        return head @ self.norm(x, "model.norm.weight")

    def run(self, tokens: list[int]) -> Tensor:
        return torch.stack([self.step(t) for t in tokens])
