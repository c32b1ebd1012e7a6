"""Train variants of the bundled model's recipe that differ by their pattern alone, and score them.

    python -m training.train_variants --english peps.txt.xz --out out --runs full:0,window:0

A run is `variant:seed`. Attention, forward and backward, is attnspan's, through `attach`. The
penalty that makes the bundled model's sinks is left out. Needs a CUDA device for the real runs.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from training.batches import Text, sample
from training.recipe import Common, command, given_by
from training.tokenizer import write_tokenizer
from training.train import Log, Texts, load_texts
from training.variants import Variant, build, running, variants
from training.variants_score import bits, score


@dataclass(frozen=True)
class Recipe(Common):
    """All numbers of the runs."""

    steps: int = 4000
    log_every: int = 500
    rows: int = 256
    examples: int = 100
    sequences: int = 8


class Masters:
    """float32 copies of the weights, which the optimizer moves; the model holds them rounded."""

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe) -> None:
        named = list(model.named_parameters())
        self.rounded = [p for _, p in named]
        self.exact = [p.detach().float().requires_grad_() for p in self.rounded]
        pairs = [(name, p) for (name, _), p in zip(named, self.exact, strict=True)]
        blocks = [p for name, p in pairs if p.ndim == 2 and ".layers." in name]
        rest = [p for name, p in pairs if p.ndim != 2 or ".layers." not in name]
        groups = [
            {"params": blocks, "weight_decay": recipe.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=self.exact[0].is_cuda
        )

    def step(self, rate: float) -> None:
        """One step at the learning rate `rate`, from the gradients of the rounded weights."""
        for exact, rounded in zip(self.exact, self.rounded, strict=True):
            assert rounded.grad is not None
            exact.grad = rounded.grad.float()
            rounded.grad = None
        nn.utils.clip_grad_norm_(self.exact, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.rounded, self.exact)


def mean_nll(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, embedding).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(
    model: LlamaForCausalLM,
    texts: Texts,
    recipe: Recipe,
    seed: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Train in place, `model` running as its variant says; returns the log's figures and speed."""
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor] = mean_nll
    if model.device.type == "cuda":
        for layer in model.model.layers:
            layer.compile(fullgraph=True, dynamic=False)
        loss_of = torch.compile(mean_nll, fullgraph=True, dynamic=False)
    masters = Masters(model, recipe)
    embedding = model.get_input_embeddings().weight
    torch.manual_seed(seed)  # of the batches, whatever a variant has drawn for its weights
    curve, since = [], time.monotonic()
    recent = torch.zeros((), device=model.device)
    started, first = since, 0
    for step in range(1, recipe.steps + 1):
        rows = sample(
            texts.python, texts.english, recipe.batch, recipe.length, recipe.english_share
        )
        hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
        loss = loss_of(hidden, embedding, rows[:, 1:])
        loss.backward()
        left = (recipe.steps - step) / (recipe.decay * recipe.steps)
        masters.step(recipe.learning_rate * min(1.0, step / recipe.warmup, left))
        recent += loss.detach()
        if step == min(50, recipe.steps):  # compiling is over
            recent.item()
            started, first = time.monotonic(), step
        if step % recipe.log_every == 0 or step == recipe.steps:
            count = step % recipe.log_every or recipe.log_every
            curve.append([step, round(recent.item() / count / math.log(2), 4)])
            recent.zero_()
            log(f"step {step} bits/byte {curve[-1][1]:.4f}")
    seconds = time.monotonic() - started
    tokens = (recipe.steps - first) * recipe.batch * recipe.length
    return {
        "curve": curve,
        "tokens": recipe.steps * recipe.batch * recipe.length,
        "tokens_per_second": round(tokens / max(seconds, 1e-9)),
    }


def held_out(texts: Texts) -> dict[str, Text]:
    return {"python": texts.python_held_out, "english": texts.english_held_out}


def run(
    name: str, variant: Variant, seed: int, texts: Texts, recipe: Recipe, tokenizer: Any, log: Log
) -> tuple[dict[str, Any], LlamaForCausalLM]:
    device = texts.python.bytes.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build(recipe.shape, seed, variant.learned_sinks).to(device, dtype)
    options: dict[str, Any] = {
        name: getattr(recipe, name) for name in ("length", "rows", "examples", "sequences")
    }
    with torch._dynamo.config.patch(recompile_limit=64), running(model, variant):
        trained = train(model, texts, recipe, seed, lambda line: log(f"{name}:{seed} {line}"))
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer._compiled_call_impl = None  # prompts have many lengths
        model.eval()
        found = score(model, tokenizer, held_out(texts), **options)
    log(
        f"{name}:{seed} python {found['python']['bits_per_byte']:.4f} "
        f"english {found['english']['bits_per_byte']:.4f} "
        f"{trained['tokens_per_second'] / 1e6:.2f} Mtokens/s"
    )
    patterns = [str(pattern) for pattern in variant.patterns(recipe.layers)]
    return {"variant": name, "seed": seed, "patterns": patterns, **trained, **found}, model


def main() -> None:
    """Read the arguments, train one run after the other, write each one's figures."""
    parser = command("train_variants", __doc__, Recipe)
    parser.add_argument("--runs", required=True, help="such as full:0,window:0,window:1")
    parser.add_argument("--applied", action="store_true", help="also score `full` as the others")
    given = parser.parse_args()
    recipe = given_by(given, Recipe)
    known = variants(recipe.length)
    runs = [part.partition(":")[::2] for part in given.runs.split(",")]
    for name, seed in runs:
        if name not in known or not seed.isdecimal():
            parser.error(f"--runs has {name}:{seed}; {', '.join(known)}, each with :seed, allowed")

    given.out.mkdir(parents=True, exist_ok=True)
    log = Log(given.out / "variants.log")
    device = torch.device(given.device)
    texts = load_texts(given.python, given.english, given.max_files, given.out, device)
    log(f"bytes: { {field.name: len(getattr(texts, field.name)) for field in fields(Texts)} }")
    write_tokenizer(given.out / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(given.out / "tokenizer")
    made = {
        "recipe": asdict(recipe),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    failed = []
    for name, seed in runs:
        try:
            figures, model = run(name, known[name], int(seed), texts, recipe, tokenizer, log)
        except (ArithmeticError, RuntimeError, ValueError) as error:
            # The runs that come after can do without this one.
            log(f"{name}:{seed} failed: {error}")
            failed.append(f"{name}:{seed}")
            continue
        if name == "full" and given.applied:
            figures["applied"] = applied(model, known, texts, recipe)
        path = given.out / f"{name}-{seed}.json"
        path.write_text(json.dumps(made | figures) + "\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def applied(
    model: LlamaForCausalLM, known: dict[str, Variant], texts: Texts, recipe: Recipe
) -> dict[str, Any]:
    """Bits a byte of a model that was trained with full attention, as the others see."""
    found = {}
    for name, variant in known.items():
        if name == "full" or variant.learned_sinks:
            continue
        with running(model, variant):
            found[name] = {
                kind: bits(model, text, recipe.rows, recipe.length).mean().item()
                for kind, text in held_out(texts).items()
            }
    return found


if __name__ == "__main__":
    main()
