"""What a cache adds to one decoded token, beside transformers' DynamicCache of the same length.

Steps of all caches are interleaved in one run, so that a machine's drift meets them alike; medians
are compared. Writes benchmarks/results/step_cost.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import write
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from attnspan.cache import parse_storage
from attnspan.models import Cache, attach
from attnspan.models.loading import load
from attnspan.policies import parse

HELD = 1024
CASES = (
    (f"window:{HELD}", "dense"),
    (f"sinks:4+window:{HELD - 4}", "dense"),
    (f"sinks:4+window:{HELD - 4}", "int8"),
    (f"sinks:4+window:{HELD - 4}", "int4"),
    (f"heavy:{HELD // 2 - 32}+window:{HELD // 2 - 31}", "dense"),
    (f"compressive:window={HELD - 324},memory=256,rate=4", "dense"),
)


def larger() -> LlamaForCausalLM:
    """A random Llama of 0.2 billion parameters: what the cache adds where products cost more."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def measure(model: Any, steps: int) -> list[dict[str, Any]]:
    ids = torch.randint(0, 256, (1, 2 * HELD), generator=torch.Generator().manual_seed(0))
    token = ids[:, :1]
    plain = DynamicCache(config=model.config)
    model(input_ids=ids[:, : HELD - 1], past_key_values=plain)

    def plain_step() -> None:
        model(input_ids=token, past_key_values=plain)
        plain.crop(-1)  # the held length stays what the others hold

    def step_of(cache: Cache) -> Callable[[], None]:
        return lambda: model(input_ids=token, past_key_values=cache, use_cache=True)

    with attach(model):
        work: dict[tuple[str, str], Callable[[], None]] = {("DynamicCache", "dense"): plain_step}
        for spec, storage in CASES:
            cache = Cache(model, parse(spec), parse_storage(storage))
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            work[spec, storage] = step_of(cache)
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in work}
        for _ in range(steps):
            for key, step in work.items():
                start = time.perf_counter()
                step()
                seconds[key].append(time.perf_counter() - start)
    base = statistics.median(seconds["DynamicCache", "dense"][steps // 10 :])
    rows = []
    for (policy, storage), series in seconds.items():
        median = statistics.median(series[steps // 10 :])
        rows.append(
            {
                "policy": policy,
                "storage": storage,
                "ms_per_step": round(median * 1e3, 3),
                "ratio": round(median / base, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    results = {}
    for name, model in (("bundled, 7.7M", load("bundled")[0]), ("random, 0.2B", larger())):
        results[name] = measure(model, steps if name.startswith("bundled") else steps // 4)
        print(f"{name}, {HELD} tokens held, float32, {torch.get_num_threads()} threads")
        for row in results[name]:
            print(
                f"  {row['policy']:44} {row['storage']:6} {row['ms_per_step']:8.2f} ms"
                f"  {row['ratio']:.3f} of DynamicCache"
            )
    write(Path("step_cost.json"), {"held": HELD, "steps": steps, "models": results})


if __name__ == "__main__":
    main()
