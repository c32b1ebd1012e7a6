"""Held-out bits per byte, and perplexity of a stream with a bounded cache."""

import math

import torch
from torch import Tensor

from training.batches import Text
from training.model import Llama, rotary, rotate
from training.tokenizer import BOS

QUERIES = 512


@torch.no_grad()
def bits_per_byte(model: Llama, text: Text, rows: int = 256) -> tuple[float, float]:
    """Over whole rows of the trained length, and over their second halves alone."""
    length = model.shape.length
    tokens = text.spread(min(rows, len(text) // length), length)
    nll = torch.cat(
        [model.nll(model.trunk(part[:, :-1])[0], part[:, 1:]) for part in tokens.split(64)]
    )
    return nll.mean().item() / math.log(2), nll[:, length // 2 :].mean().item() / math.log(2)


@torch.no_grad()
def stream_nll(model: Llama, tokens: Tensor, cache: int, sinks: int) -> Tensor:
    """Nats of each token of `(rows, n + 1)`, the cache holding `cache` tokens, itself included.

    It keeps the first `sinks` tokens and the latest others. Keys are rotated by their place in the
    cache, as StreamingLLM does (Xiao et al., 2023), by rotating each query twice.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    n, shape = inputs.shape[1], model.shape
    positions = torch.arange(n, device=inputs.device)
    cos, sin = rotary(positions, shape.head_dim)
    cos_in_cache, sin_in_cache = rotary(positions.clamp(max=cache - 1), shape.head_dim)
    x = model.embed(inputs)
    for block in model.layers():
        q, k, v = block.project(x)
        near = rotate(q.float(), cos, sin)
        far = rotate(q.float(), cos_in_cache, sin_in_cache)
        k, v = rotate(k.float(), cos, sin), v.float()
        read = []
        for begin in range(0, n, QUERIES):
            end, first = min(n, begin + QUERIES), max(0, begin - cache)
            i, j = positions[begin:end, None], positions[None, first:end]
            seen = (j <= i) & (i - j < cache - sinks) & (j >= sinks)
            window = near[:, :, begin:end] @ k[:, :, first:end].transpose(-1, -2)
            kept = far[:, :, begin:end] @ k[:, :, :sinks].transpose(-1, -2)
            kept = kept.masked_fill(positions[None, :sinks] > i, -torch.inf)
            scores = torch.cat([kept, window.masked_fill(~seen, -torch.inf)], -1)
            attention = (scores / shape.head_dim**0.5).softmax(-1)
            read.append(attention @ torch.cat([v[:, :, :sinks], v[:, :, first:end]], 2))
        x = block.finish(x, torch.cat(read, 2).to(x.dtype))
    rows = [model.nll(x[r : r + 1], targets[r : r + 1]) for r in range(len(x))]
    return torch.cat(rows)


@torch.no_grad()
def recompute_nll(model: Llama, tokens: Tensor, cache: int, every: int) -> Tensor:
    """Nats of every `every`-th token past the trained length, given BOS and `cache - 1` tokens."""
    first = model.shape.length
    places = torch.arange(first, tokens.shape[1] - 1, every, device=tokens.device)
    back = torch.arange(2 - cache, 1, device=tokens.device)
    nll = []
    for row in tokens:
        for part in places.split(256):
            recent = row[part[:, None] + back]
            inputs = torch.cat([torch.full_like(recent[:, :1], BOS), recent], 1)
            x = model.trunk(inputs)[0][:, -1:]
            nll.append(model.nll(x, row[part + 1][:, None]).flatten())
    return torch.cat(nll)


def stream_table(model: Llama, text: Text, rows: int, length: int) -> list[dict[str, float]]:
    """Byte perplexity after the trained length: window alone, with sinks, and recomputed."""
    tokens = text.spread(rows, length)
    start = model.shape.length

    def perplexity(nll: Tensor) -> float:
        return round(math.exp(nll.mean().item()), 4)

    table = []
    for cache in (start // 4, start // 2):
        window = perplexity(stream_nll(model, tokens, cache, 0)[:, start:])
        sinks = perplexity(stream_nll(model, tokens, cache, 4)[:, start:])
        fresh = perplexity(recompute_nll(model, tokens, cache, 16))
        row = {"cache": cache, "window": window, "sinks_4": sinks, "recompute": fresh}
        table.append(row | {"window_over_sinks": round(window / sinks, 4)})
    return table
