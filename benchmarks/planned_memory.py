"""Planned bytes of caches and prefills beside those that small random models really take.

Writes benchmarks/results/planned_memory.json, and with --docs the table of docs/planning-memory.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, write
from transformers import AutoConfig, AutoModelForCausalLM

from attnspan.cache import parse_storage
from attnspan.evaluation.files import write_file
from attnspan.evaluation.verify import verify
from attnspan.policies import parse_list

DOCS = Path(__file__).parent.parent / "docs" / "planning-memory.md"
START, END = (
    "<!-- table: written by benchmarks/planned_memory.py --docs -->",
    "<!-- end of table -->",
)
RUNS = (("float32", 1024, 1), ("bfloat16", 512, 2))
POLICIES = "keep-all, sinks:4+window:60, heavy:32+window:16"
STORAGES = "dense, int8, int4"

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 128}
ROTATION = {"rope_type": "default", "rope_theta": 10_000.0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Mistral, window 128": ("mistral", {"sliding_window": 128}),
    "Mistral, no window": ("mistral", {"sliding_window": None}),
    "Qwen 2": ("qwen2", {}),
    "Qwen 3": ("qwen3", {}),
    "Gemma 2": ("gemma2", {**SLIDING, "query_pre_attn_scalar": 32}),
    "Gemma 3": (
        "gemma3_text",
        {
            **SLIDING,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {"full_attention": ROTATION, "sliding_attention": ROTATION},
        },
    ),
    "Phi 3": ("phi3", {"sliding_window": None}),
    "GPT-NeoX": ("gpt_neox", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", SLIDING),
    "Granite": ("granite", {}),
    "Cohere 2": ("cohere2", SLIDING),
    "SmolLM 3": ("smollm3", {}),
    "gpt-oss": ("gpt_oss", {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "Qwen 3 MoE": ("qwen3_moe", {"num_experts": 4, **EXPERTS}),
    "DeepSeek V3": (
        "deepseek_v3",
        {
            **EXPERTS,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "kv_lora_rank": 48,
            "q_lora_rank": 40,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 24,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}


def measure(kind: str, changes: dict[str, Any], dtype: str, tokens: int, batch: int) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **changes})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return verify(
        model.eval(),
        context=tokens,
        batch=batch,
        policies=parse_list(POLICIES),
        storages=[parse_storage(name) for name in STORAGES.split(",")],
    )


def table(found: list[dict[str, Any]]) -> str:
    dtype, tokens, _ = RUNS[0]
    more = ", ".join(f"{name}, {count} tokens x {rows}" for name, count, rows in RUNS[1:])
    lines = [
        f"| {dtype}, {tokens} tokens | cache after prefill | prefill's peak, sdpa | eager | "
        f"figures off by more than allowed, {more} included |",
        "|---|---:|---:|---:|---|",
    ]
    for name in FAMILIES:
        runs = [run for run in found if run["model"] == name]
        rows = {row["what"]: row for row in runs[0]["rows"]}
        count = sum(len(run["rows"]) for run in runs)
        missed = [
            f"{row['what']} {_share(row, 1)} ({run['meta']['dtype']})"
            for run in runs
            for row in run["rows"]
            if row["miss"]
        ]
        cells = [_pair(rows.get("transformers' cache after prefill"))]
        cells += [_pair(rows.get(f"prefill's peak, {each}")) for each in ("sdpa", "eager")]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {'; '.join(missed) or 'none'}, of {count} |"
        )
    return "\n".join(lines)


def _pair(row: dict[str, Any] | None) -> str:
    if row is None:
        return "it has none"
    if row["planned"] == row["measured"]:
        return f"{row['planned']:,}"
    return f"{row['planned']:,} / {row['measured']:,} ({_share(row, 2)})"


def _share(row: dict[str, Any], digits: int) -> str:
    return "-" if row["off"] is None else f"{row['off']:+.{digits}%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true", help="write the table of the document")
    asked = parser.parse_args()
    found = [
        {"model": name, **measure(kind, changes, *run)}
        for name, (kind, changes) in FAMILIES.items()
        for run in RUNS
    ]
    path = write(RESULTS / "planned_memory.json", {"runs": found})
    print(table(found))
    print(f"\n{path}")
    if asked.docs:
        text = DOCS.read_text(encoding="utf-8")
        before, after = text.split(START)[0], text.split(END)[1]
        write_file(DOCS, f"{before}{START}\n{table(found)}\n{END}{after}".encode())


if __name__ == "__main__":
    main()
