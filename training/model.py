"""The model in training form: Llama, its projections fused, with a penalty on attention writes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.tokenizer import VOCAB

THETA, EPS = 10_000.0, 1e-5


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; a head is `width / heads` wide."""

    width: int = 256
    layers: int = 10
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 736
    length: int = 1024

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each `(positions, head_dim)`."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] / THETA**exponents
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (weight * wide).to(x.dtype)


def normal(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*size) * 0.02)


class Block(nn.Module):
    """One layer. `x` is `(batch, tokens, width)`; heads come first elsewhere."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, dim = shape.width, shape.head_dim
        self.shape = shape
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.qkv = normal((shape.heads + 2 * shape.kv_heads) * dim, width)
        self.out = normal(width, shape.heads * dim)
        self.ffn_norm = nn.Parameter(torch.ones(width))
        self.gate_up = normal(2 * shape.ffn, width)
        self.down = normal(width, shape.ffn)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `(batch, heads, tokens, head_dim)`, not rotated.

        Keys and values are repeated to the queries' number of heads.
        """
        s = self.shape
        joint = F.linear(rms_norm(x, self.attention_norm), self.qkv.to(x.dtype))
        joint = joint.view(*x.shape[:2], -1, s.head_dim).transpose(1, 2)
        q, k, v = joint.split([s.heads, s.kv_heads, s.kv_heads], 1)
        group = s.heads // s.kv_heads
        return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def finish(self, x: Tensor, heads: Tensor) -> Tensor:
        """The layer's output, given what its heads read."""
        x = x + F.linear(heads.transpose(1, 2).flatten(2), self.out.to(x.dtype))
        gate, up = F.linear(rms_norm(x, self.ffn_norm), self.gate_up.to(x.dtype)).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down.to(x.dtype))

    def penalty(self, x: Tensor, heads: Tensor) -> Tensor:
        """What the heads write, relative to the stream: a group lasso over heads.

        The sum over heads of the mean over tokens of `|o| |W_o|_F / (sqrt(head_dim) |x|)`. A head
        that has nothing to say pays least by reading a token whose value is near zero: BOS.
        """
        read = heads.float().square().sum(-1).add(1e-8).sqrt()
        by_head = self.out.float().view(self.shape.width, self.shape.heads, -1)
        gain = by_head.square().sum((0, 2)).sqrt() / math.sqrt(self.shape.head_dim)
        stream = x.detach().float().square().sum(-1).sqrt() + 1e-3
        return (read * gain[:, None] / stream[:, None]).mean((0, 2)).sum()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output and its penalty."""
        q, k, v = self.project(x)
        q = rotate(q.float(), cos, sin).to(x.dtype)
        k = rotate(k.float(), cos, sin).to(x.dtype)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.finish(x, heads), self.penalty(x, heads)


RunBlock = Callable[[Block, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Llama(nn.Module):
    """The whole model; embeddings are tied. Weights are float32, activations `dtype`."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.embedding = normal(VOCAB, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width))

    def layers(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding).to(self.dtype)

    def trunk(self, tokens: Tensor, run: RunBlock = Block.forward) -> tuple[Tensor, Tensor]:
        """`(batch, tokens, width)` before the last norm, and the penalty summed over layers."""
        x = self.embed(tokens)
        penalty = torch.zeros((), device=x.device)
        cos, sin = rotary(torch.arange(tokens.shape[1], device=x.device), self.shape.head_dim)
        for block in self.layers():
            x, added = run(block, x, cos, sin)
            penalty = penalty + added
        return x, penalty

    def nll(self, x: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each target, given the trunk's output."""
        return token_nll(x, self.norm, self.embedding, targets)


def token_nll(x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """`(batch, tokens)` of nats."""
    logits = F.linear(rms_norm(x, norm), embedding.to(x.dtype)).float()
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nll.view(targets.shape)
