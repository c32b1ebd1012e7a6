"""A Mistral-7B-shaped model streams on a GPU: a token's time far out beside one near the start.

Random bfloat16 weights, one row, a window of 4096, int8 keys and values. A million steps would take
an hour, so the far cache's counts are set forward once its window is full; then more tokens than
the window holds go in as a prompt, so that all it holds has been taken in at its true place, and
steps begin 64 before token 1,000,000. Bursts at both places, of the pass that only reads the
weights, and of steps without the joined kernels and without a graph are interleaved; medians of
bursts are compared. Writes benchmarks/results/gpu_stream.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from record import write
from transformers import MistralConfig, MistralForCausalLM

from attnspan.cache import parse_storage
from attnspan.models import Cache, StepGraph, attach
from attnspan.policies import Window

WINDOW = 4096
NEAR, FAR = 8_000, 1_000_000
LEAD = 64  # steps before a place's first measured token


def mistral(layers: int) -> MistralForCausalLM:
    """Mistral 7B's shape, with random weights made on the device."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=WINDOW,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    with torch.device("cuda"):
        return MistralForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def prompt(model: Any, cache: Cache, count: int, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    ids = torch.randint(0, 32_000, (1, count), generator=generator, device="cuda")
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def moved(model: Any, cache: Cache, to: int) -> Cache:
    """A copy of `cache` that has seen `to` tokens more than it has."""
    copy = Cache(model, cache.policy, cache.storage)
    tensors, meta = cache.state()
    seen = cache.tokens_seen + to
    layers = [[{**lane, "seen": seen} for lane in layer] for layer in meta["layers"]]
    copy.load_state(
        tensors, {**meta, "seen": [seen], "columns": seen, "runs": [[(0, seen)]], "layers": layers}
    )
    return copy


@triton.jit
def read(x, found, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(x + at, mask=at < n, other=0, eviction_policy="evict_first")
    if tl.max(words, 0) == 0x7FFFFFFF:  # of two bf16: NaN, so never, but the compiler can't know
        tl.store(found, 1)


def reading(weights: Sequence[torch.Tensor]) -> Callable[[], None]:
    """A graph that reads every byte of the weights and does nothing else."""
    found = torch.zeros(1, dtype=torch.int32, device="cuda")
    words = [w.detach().reshape(-1).view(torch.int32) for w in weights]

    kernel: Any = read

    def run() -> None:
        for x in words:
            kernel[(triton.cdiv(x.numel(), 8192),)](x, found, x.numel(), BLOCK=8192, num_warps=8)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def burst(step: Callable[[], Any], count: int) -> float:
    """Milliseconds a step, from when the device is idle to when it is idle again."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / count


def summary(series: list[float]) -> dict[str, Any]:
    low, _, high = statistics.quantiles(series, n=4)
    return {
        "ms": round(statistics.median(series), 4),
        "quartiles": [round(low, 4), round(high, 4)],
    }


def measure(layers: int, rounds: int, tokens: int) -> dict[str, Any]:
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - began:5.1f}] {what}", flush=True)

    model = mistral(layers)
    say("model built")
    with attach(model):
        say("attached")
        near = Cache(model, Window(WINDOW), parse_storage("int8"))
        prompt(model, near, NEAR - LEAD, seed=1)
        lead = WINDOW + 512
        far = moved(model, near, FAR - LEAD - lead - near.tokens_seen)
        prompt(model, far, lead, seed=2)
        own, plain = (moved(model, near, 0) for _ in range(2))
        bytes_near = near.nbytes
        say(f"prompts: {near.tokens_seen} and {far.tokens_seen} tokens seen")
        steps = {"near": StepGraph(model, near), "far": StepGraph(model, far)}
        steps["own forward"] = StepGraph(model, own, fused=False)
        say(f"joined kernels: {steps['near'].fused or steps['near'].why}")
        token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")

        def uncaptured() -> None:
            model(input_ids=token, past_key_values=plain, use_cache=True)

        weights = [p for name, p in model.named_parameters() if "embed_tokens" not in name]
        work: dict[str, tuple[Callable[[], Any], int]] = {
            "weights": (reading(weights), tokens),
            "no graph": (uncaptured, max(1, tokens // 8)),
        }
        for name, step in steps.items():
            for i in range(LEAD):  # the last of these was captured long before
                step(i)
            say(f"{name}: at token {step.cache.tokens_seen}")
            work[name] = (step, tokens)
        with torch.inference_mode():
            for _ in range(3):
                uncaptured()
            times: dict[str, list[float]] = {name: [] for name in work}
            for _ in range(rounds):
                for name, (step, count) in work.items():
                    times[name].append(burst(step, count))
        say("measured")
        found = {name: summary(series) for name, series in times.items()}
        nbytes = sum(w.nbytes for w in weights)
        near_ms, far_ms = found["near"]["ms"], found["far"]["ms"]
        found["near"] |= {"from": NEAR, "to": near.tokens_seen, "cache_bytes": near.nbytes}
        found["far"] |= {"from": FAR, "to": far.tokens_seen, "cache_bytes": far.nbytes}
        read_ms = found["weights"]["ms"]
        found["weights"] |= {"bytes": nbytes, "GB/s": round(nbytes / read_ms / 1e6)}
        return {
            "model": "Mistral 7B's shape, random bfloat16 weights",
            "layers": layers,
            "window": WINDOW,
            "storage": "int8",
            "batch": 1,
            "rounds": rounds,
            "tokens a burst": tokens,
            "counts": (
                f"the far cache's counts were set forward; its last {lead + LEAD} tokens before "
                f"{FAR} were taken in at their places"
            ),
            "joined kernels": steps["near"].fused or steps["near"].why,
            "far over near": round(far_ms / near_ms, 4),
            "share of the weights' read": round(read_ms / far_ms, 4),
            "cache bytes before steps": bytes_near,
            "steps": found,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32, help="steps a burst")
    parser.add_argument("--name", default="gpu_stream.json")
    arguments = parser.parse_args()
    results = measure(arguments.layers, arguments.rounds, arguments.tokens)
    for name, row in results["steps"].items():
        low, high = row["quartiles"]
        print(f"  {name:12} {row['ms']:8.3f} ms a token ({low:.3f} to {high:.3f})")
    print(f"  far over near {results['far over near']:.4f}")
    share = results["share of the weights' read"]
    print(f"  share of the weights' read {share:.3f}")
    print(write(Path(arguments.name), results).read_text())


if __name__ == "__main__":
    main()
