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
    tensors, meta = cache.state(copy=False)
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


def measure(layers: int, rounds: int, tokens: int, compiled: bool) -> dict[str, Any]:
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
        plain = moved(model, near, 0)
        say(f"prompts: {near.tokens_seen} and {far.tokens_seen} tokens seen")
        steps = {"near": StepGraph(model, near), "far": StepGraph(model, far)}
        if compiled:
            for name, cache in (("near", near), ("far", far)):
                again = moved(model, cache, 0)
                steps[f"{name}, compiled"] = StepGraph(model, again, compiled=True)
        token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")

        def uncaptured() -> None:
            with torch.inference_mode():
                model(input_ids=token, past_key_values=plain, use_cache=True)

        weights = [p for name, p in model.named_parameters() if "embed_tokens" not in name]
        work: dict[str, tuple[Callable[[], Any], int]] = {
            "weights": (reading(weights), tokens),
            "no graph": (uncaptured, max(1, tokens // 8)),
        }
        before = {name: step.cache.nbytes for name, step in steps.items()}
        for name, step in steps.items():
            for i in range(LEAD):
                step(i)
            torch.cuda.synchronize()
            say(f"{name}: at token {step.cache.tokens_seen}")
            work[name] = (step, tokens)
        for _ in range(3):
            uncaptured()
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(rounds):
            for name, (step, count) in work.items():
                times[name].append(burst(step, count))
        say("measured")
        found = {name: summary(series) for name, series in times.items()}
        nbytes = sum(w.nbytes for w in weights)
        read_ms = found["weights"]["ms"]
        found["weights"] |= {"bytes": nbytes, "GB/s": round(nbytes / read_ms / 1e6)}
        found["no graph"]["share"] = round(read_ms / found["no graph"]["ms"], 4)
        for name, step in steps.items():
            to = step.cache.tokens_seen
            found[name] |= {
                "first token": to - rounds * tokens,
                "last token": to,
                "cache bytes before": before[name],
                "cache bytes after": step.cache.nbytes,
                "share": round(read_ms / found[name]["ms"], 4),
            }
        kinds = ("", ", compiled")[: 1 + compiled]
        return {
            "model": "Mistral 7B's shape, random bfloat16 weights",
            "layers": layers,
            "window": WINDOW,
            "storage": "int8",
            "batch": 1,
            "rounds": rounds,
            "tokens a burst": tokens,
            "counts": (
                f"the far cache's counts were set forward; the last {lead + LEAD} tokens before "
                f"{FAR} were taken in at their places"
            ),
            "weights": "all that a step reads: every parameter but the embedding's table",
            "far over near": {
                f"graph{kind}": round(found[f"far{kind}"]["ms"] / found[f"near{kind}"]["ms"], 4)
                for kind in kinds
            },
            "steps": found,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32, help="steps a burst")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile's steps")
    parser.add_argument("--name", default="gpu_stream.json")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU")
    results = measure(given.layers, given.rounds, given.tokens, not given.no_compile)
    for name, row in results["steps"].items():
        low, high = row["quartiles"]
        share = f"{row['share']:.3f} of it the weights' read" if "share" in row else ""
        print(f"  {name:16} {row['ms']:8.3f} ms a token ({low:.3f} to {high:.3f})  {share}")
    print(f"  far over near {results['far over near']}")
    print(write(Path(given.name), results).read_text())


if __name__ == "__main__":
    main()
