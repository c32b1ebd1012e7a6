"""Trains a small model with sliding windows, and the same one under a dense mask, side by side.

    python examples/train_window.py [--window 64] [--length 512] [--steps 60]

Both start from the same weights and see the same bytes of Python's own library. Their losses agree
to the rounding of fp32; what differs is the cost, which grows with the window in one and with the
square of the length in the other.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import attnspan as span
from attnspan.evaluation.texts import python_heldout


def batches(length: int, steps: int, seed: int = 0) -> Iterator[Tensor]:
    """`(2, length)` bytes of source from random places, as token ids."""
    text = torch.tensor(list(python_heldout().encode()), dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - length, (2,), generator=generator)
        yield torch.stack([text[start : start + length] for start in starts.tolist()])


def dense_mask(window: int, length: int) -> Tensor:
    """The window as transformers takes any pattern: 0 or minus infinity, `(1, 1, n, n)`."""
    place = torch.arange(length)
    seen = span.SlidingWindow(window).sees(place[:, None], place)
    return torch.zeros(1, 1, length, length).masked_fill(~seen, -torch.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=64, help="keys that a token sees")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    if min(options.window, options.length, options.steps) < 1:
        parser.error("--window, --length and --steps are whole numbers of at least 1")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=options.length,
    )
    windowed = LlamaForCausalLM(config)
    dense = copy.deepcopy(windowed)
    masks = {"attention_mask": dense_mask(options.window, options.length)}
    runs = (
        (windowed, span.attach(windowed, span.SlidingWindow(options.window)), {}),
        (dense, nullcontext(), masks),
    )
    losses: list[list[float]] = []
    for model, context, extra in runs:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        started = time.perf_counter()
        with context:
            for ids in batches(options.length, options.steps):
                loss = model(input_ids=ids, labels=ids, use_cache=False, **extra).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
        seconds = time.perf_counter() - started
        print(f"{'dense mask' if extra else 'attnspan'}: {seconds:.1f} s for {options.steps} steps")
    print(f"{'step':>5} {'attnspan':>10} {'dense mask':>10}")
    for step in range(0, options.steps, max(1, options.steps // 6)):
        print(f"{step:>5} {losses[0][step]:>10.5f} {losses[1][step]:>10.5f}")
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(f"furthest apart: {apart:.1e}")


if __name__ == "__main__":
    main()
