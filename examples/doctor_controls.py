"""Makes two small models that `attnspan doctor` must tell apart from one with sinks.

    python examples/doctor_controls.py [--out controls] [--steps 3000]
    attnspan doctor controls/random
    attnspan doctor controls/windowed
    attnspan doctor controls/undeclared

`random` has never been trained. `windowed` was trained from its first step with every layer under a
sliding window, which its config declares; `undeclared` has the same weights under a config that
knows of no window, so that all layers see all of the past. All are byte-level, with the tokenizer
of the bundled model, and were trained on modules of Python's standard library that the doctor's
own texts leave out.
"""

from __future__ import annotations

import argparse
import shutil
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import attnspan as span
from attnspan.models import bundled

BOS = 256
WINDOW = 32
LENGTH = 256
SHAPE = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def source() -> Tensor:
    """The bytes of the standard library's top modules, in alphabetical order."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.tensor(list(b"".join(path.read_bytes() for path in paths)), dtype=torch.long)


def batches(text: Tensor, rows: int, length: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`(rows, length)` ids: BOS, then bytes from a random place."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length - 1)
    for _ in range(steps):
        starts = torch.randint(len(text) - length, (rows, 1), generator=generator)
        yield torch.cat((torch.full((rows, 1), BOS), text[starts + offsets]), 1)


def untrained(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def train(
    steps: int, window: int = WINDOW, rows: int = 16, length: int = 128, seed: int = 0
) -> LlamaForCausalLM:
    """A Llama whose every layer has only ever seen the nearest `window` tokens."""
    model = untrained(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    warm = min(50, steps // 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warm + 1), 1.0) * (1 - step / steps)
    )
    with span.attach(model, span.SlidingWindow(window)):
        for ids in batches(source(), rows, length, steps, seed):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def declared(model: LlamaForCausalLM, window: int = WINDOW) -> MistralForCausalLM:
    """The same weights, under a config that says what window they were trained with."""
    same = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window))
    same.load_state_dict(model.state_dict())
    return same.eval()


def save(model: LlamaForCausalLM | MistralForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path() / name, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("controls"))
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    if options.steps < 4:
        parser.error("--steps is a whole number of at least 4")
    save(untrained(), options.out / "random")
    started = time.perf_counter()
    model = train(options.steps)
    save(model, options.out / "undeclared")
    save(declared(model), options.out / "windowed")
    print(f"{options.steps} steps in {time.perf_counter() - started:.0f} s; see {options.out}")


if __name__ == "__main__":
    main()
