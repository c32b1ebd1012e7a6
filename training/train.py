"""Train the bundled model and write its folder, log, evaluation and list of sources.

    python -m training.train --english peps.txt.xz --out out --seconds 500

Needs torch, numpy, safetensors and tokenizers, a CUDA device for the real run, and no network.
"""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from training import corpus
from training.batches import Text, sample
from training.english import read_text, split_english
from training.evaluation import bits_per_byte, stream_table
from training.export import export
from training.model import Block, Llama, RunBlock, token_nll
from training.recipe import Common, command, given_by
from training.sinks import Penalty, attention_to_bos, sink_share


@dataclass(frozen=True)
class Recipe(Common):
    """All numbers of a run. It ends after `steps`, or where that is 0 after `seconds`."""

    seconds: float = 500.0
    steps: int = 0
    seed: int = 0
    penalty: float = 0.03
    probe_every: int = 500
    stream_rows: int = 16
    stream_bytes: int = 8192


@dataclass(frozen=True)
class Texts:
    """What is trained on, and what isn't."""

    python: Text
    english: Text
    python_held_out: Text
    english_held_out: Text


class Log:
    """Lines on the screen and in a file, each with the seconds since the start."""

    def __init__(self, path: Path) -> None:
        self.begun = time.monotonic()
        self.path = path
        path.unlink(missing_ok=True)

    def __call__(self, line: str) -> None:
        line = f"[{time.monotonic() - self.begun:6.1f}] {line}"
        print(line, flush=True)
        with self.path.open("a") as file:
            print(line, file=file)


def load_texts(
    roots: list[Path], english: Path, limit: int | None, out: Path, device: torch.device
) -> Texts:
    """Read both corpora, and write `corpus.json`: where the Python comes from."""
    python = corpus.build(roots, os.cpu_count() or 1, limit)
    trained, held_out = split_english(read_text(english))
    summary = {
        "python_documents": len(python.trained),
        "python_bytes": sum(map(len, python.trained)),
        "english_documents": len(trained),
        "english_bytes": sum(len(document.encode()) for document in trained),
        "sources": python.sources,
        "left_out_for_their_licence": python.left_out,
    }
    (out / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n")
    return Texts(
        Text(python.trained, device),
        Text([document.encode() for document in trained], device),
        Text(python.held_out, device),
        Text([document.encode() for document in held_out], device),
    )


def optimizer_for(model: Llama, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on the blocks' matrices only."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.blocks.parameters() if p.ndim == 1] + [model.embedding, model.norm]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    fused = model.embedding.is_cuda
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=fused)


Losses = Callable[[Tensor], tuple[Tensor, Tensor]]


def losses_of(model: Llama, compiled: bool) -> Losses:
    """A function from rows of tokens to the mean nats a token and the attention penalty."""
    run: RunBlock = Block.forward
    nll = token_nll
    if compiled:
        run = torch.compile(Block.forward, fullgraph=True, dynamic=False)
        nll = torch.compile(token_nll, fullgraph=True, dynamic=False)

    def losses(rows: Tensor) -> tuple[Tensor, Tensor]:
        x, penalty = model.trunk(rows[:, :-1], run)
        return nll(x, model.norm, model.embedding, rows[:, 1:]).mean(), penalty

    return losses


def check_compiled(model: Llama, compiled: Losses, rows: Tensor) -> None:
    """Raise RuntimeError unless compiled loss and gradient norm agree with the plain ones."""
    found = []
    for losses in (losses_of(model, compiled=False), compiled):
        loss, penalty = losses(rows)
        (loss + penalty).backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        found.append((loss.item(), norm.item()))
        model.zero_grad(set_to_none=True)
    (plain_loss, plain_norm), (loss, norm) = found
    if abs(loss - plain_loss) > 0.02 or abs(norm / plain_norm - 1) > 0.05:
        raise RuntimeError(f"compiled loss and gradient norm are off: {found}")


def train(model: Llama, texts: Texts, recipe: Recipe, out: Path, log: Log) -> dict[str, float]:
    """Train in place; returns steps, tokens, seconds and tokens per second.

    The model folder is written once before the learning rate falls, in case the run is cut short.
    """
    compiled = model.embedding.is_cuda
    losses = losses_of(model, compiled)
    batch = (texts.python, texts.english, recipe.batch, recipe.length, recipe.english_share)
    if compiled:
        check_compiled(model, losses, sample(*batch))
        log("compiled loss and gradient agree with plain ones")
    optimizer = optimizer_for(model, recipe)
    penalty = Penalty(recipe.penalty)
    begun = time.monotonic()
    step, progress, saved = 0, 0.0, False
    since, recent = begun, torch.zeros((), device=model.embedding.device)
    while progress < 1.0:
        rate = min(1.0, (step + 1) / recipe.warmup, (1.0 - progress) / recipe.decay)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        loss, written = losses(sample(*batch))
        (loss + penalty(progress) * written).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent += loss.detach()
        step += 1

        if recipe.steps:
            progress = step / recipe.steps
        elif step % 10 == 0:
            loss.item()  # waits for the device, so that the clock counts work that is done
            progress = (time.monotonic() - begun) / recipe.seconds
        if progress > 1.0 - recipe.decay and not saved:
            export(model, out / "model")
            saved = True
        if step % recipe.probe_every == 0:
            attention = attention_to_bos(model, texts.python)
            held_out = bits_per_byte(model, texts.python_held_out, 32)[0]
            now = time.monotonic()
            tokens = recipe.probe_every * recipe.batch * recipe.length
            log(
                f"step {step} bits/byte {recent.item() / recipe.probe_every / math.log(2):.4f}"
                f" held out {held_out:.4f} penalty {written.item():.3f} x {penalty(progress):.4f}"
                f" sink heads {sink_share(attention):.3f} mean {attention.mean().item():.3f}"
                f" rate {rate:.3f} Mtokens/s {tokens / (now - since) / 1e6:.3f}"
            )
            penalty.steer(progress, sink_share(attention))
            since = now
            recent.zero_()
    seconds = time.monotonic() - begun
    tokens = step * recipe.batch * recipe.length
    return {
        "steps": step,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
    }


def evaluate(model: Llama, texts: Texts, recipe: Recipe) -> dict[str, object]:
    """All held-out numbers, of the weights as they ship: rounded to bfloat16."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    attention = attention_to_bos(model, texts.python_held_out)
    result: dict[str, object] = {
        "sink_share": sink_share(attention),
        "attention_to_bos_mean": round(attention.mean().item(), 4),
        "attention_to_bos": [[round(head, 3) for head in layer] for layer in attention.tolist()],
    }
    for name, text in (("python", texts.python_held_out), ("english", texts.english_held_out)):
        whole, late = bits_per_byte(model, text)
        result[name] = {
            "bits_per_byte": round(whole, 4),
            "bits_per_byte_second_half": round(late, 4),
            "stream_perplexity": stream_table(model, text, recipe.stream_rows, recipe.stream_bytes),
        }
    return result


def main() -> None:
    """Read the arguments, train, export, evaluate."""
    parser = command("train", __doc__, Recipe)
    given = parser.parse_args()
    recipe = given_by(given, Recipe)
    device = torch.device(given.device)

    given.out.mkdir(parents=True, exist_ok=True)
    log = Log(given.out / "train.log")
    texts = load_texts(given.python, given.english, given.max_files, given.out, device)
    sizes = {field.name: len(getattr(texts, field.name)) for field in fields(Texts)}
    log(f"bytes: {sizes}")
    if min(sizes.values()) <= recipe.length:
        parser.error(f"a text is too short for rows of {recipe.length} bytes: {sizes}")
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    on_gpu = device.type == "cuda"
    model = Llama(recipe.shape, torch.bfloat16 if on_gpu else torch.float32).to(device)
    log(f"{sum(p.numel() for p in model.parameters())} parameters, {recipe}")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if on_gpu else nullcontext():
        run = train(model, texts, recipe, given.out, log)
    export(model, given.out / "model")
    log(f"trained and written: {run}")
    result = {
        "recipe": asdict(recipe),
        "run": run,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    result |= evaluate(model, texts, recipe)
    (given.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    log(json.dumps({key: result[key] for key in ("sink_share", "python", "english")}))


if __name__ == "__main__":
    main()
