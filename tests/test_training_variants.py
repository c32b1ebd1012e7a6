"""Variants that differ by their pattern: what they see, their training in small, their tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnspan.planner.article import claims
from training.model import Shape
from training.train_variants import Masters, Recipe
from training.variants import Variant, build, running, variants
from training.variants_report import (
    RESULTS,
    by_variant,
    difference,
    filled,
    joined,
    mean_bits,
    seed_noise,
)
from training.variants_score import Whole

ROOT = Path(__file__).parents[1]
TINY = Shape(width=32, layers=4, heads=2, kv_heads=1, ffn=48, length=64)
IDS = (torch.arange(2 * 64).view(2, 64) * 7) % 256


def logits(name: str, ids: torch.Tensor = IDS) -> torch.Tensor:
    variant = variants(64)[name]
    model = build(TINY, 0, variant.learned_sinks).eval()
    with running(model, variant), torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_variants_start_from_the_same_weights() -> None:
    one, other = build(TINY, 3, False), build(TINY, 3, True)
    others = dict(other.named_parameters())
    assert all(torch.equal(p, others[name]) for name, p in one.named_parameters())
    assert sum("sinks" in name for name in others) == TINY.layers


def test_only_layers_three_and_seven_of_a_hybrid_see_all() -> None:
    kinds = [str(p) for p in variants(64)["hybrid"].patterns(10)]
    assert [i for i, kind in enumerate(kinds) if kind == "Causal()"] == [3, 7]
    assert set(kinds) == {"Causal()", "SlidingWindow(8)"}


@pytest.mark.parametrize(
    ("name", "moved"),
    [("full", True), ("window", False), ("blockwise", False), ("hybrid", True)],
)
def test_a_variant_sees_what_its_pattern_lets_through(name: str, moved: bool) -> None:
    """Four layers of a window of 8 reach 28 tokens back, blocks of 8 fewer; token 4 is farther."""
    changed = IDS.clone()
    changed[:, 4] = 255 - changed[:, 4]
    same = torch.equal(logits(name)[:, -1], logits(name, changed)[:, -1])
    assert same is not moved


def test_learned_sinks_take_weight_and_learn() -> None:
    variant = variants(64)["learned-sinks"]
    model = build(TINY, 0, True).eval()
    plain = logits("window")
    with running(model, variant):
        found = model(input_ids=IDS, use_cache=False).logits
        assert not torch.allclose(found, plain, atol=1e-4)
        found.square().mean().backward()
        for layer in model.model.layers:
            assert layer.self_attn.sinks.grad.abs().min() > 0
            layer.self_attn.sinks.data.fill_(-100.0)
        without = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(without, plain, atol=1e-5, rtol=1e-4)
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_masters_step_as_adamw_on_the_same_weights_would() -> None:
    recipe = Recipe(width=32, layers=1, heads=2, kv_heads=1, ffn=48, length=64)
    model, plain = build(recipe.shape, 0, False), build(recipe.shape, 0, False)
    masters = Masters(model, recipe)
    blocks = [p for n, p in plain.named_parameters() if p.ndim == 2 and ".layers." in n]
    rest = [p for n, p in plain.named_parameters() if p.ndim != 2 or ".layers." not in n]
    optimizer = torch.optim.AdamW(
        [{"params": blocks, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
    )
    for _ in range(3):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        masters.step(1e-3)
        plain(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_session_without_a_cache_gives_the_whole_forward() -> None:
    model = build(TINY, 0, False).eval()
    with running(model, Variant(variants(64)["window"].pattern)):
        session = Whole(model)
        session.feed(IDS[:, :40], 1)
        session.feed(IDS[:, 3:9], 2)
        session.undo(6)
        found = session.feed(IDS[:, 40:50], 10)
        with torch.no_grad():
            expected = model(input_ids=IDS[:, :50], use_cache=False).logits[:, 40:50]
    torch.testing.assert_close(found, expected)


def test_runs_and_tables_in_small(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    for name in ("os.py", "json/decoder.py", "asyncio/events.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"value_{name[:2]}_{i} = compute_something({i})\n" for i in range(60))
        (library / name).write_text(text)
    english = tmp_path / "english.txt"
    english.write_text("The quick brown fox jumps over the lazy dog. " * 12_000)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "training.train_variants", "--english", str(english)]
    command += ["--python", str(library), "--out", str(out), "--device", "cpu", "--applied"]
    command += ["--runs", "full:0,full:1,learned-sinks:0"]
    for name, value in {
        **{"steps": 2, "width": 32, "layers": 2, "heads": 2, "kv-heads": 1, "ffn": 48},
        **{"length": 64, "batch": 2, "rows": 2, "examples": 2, "sequences": 1, "log-every": 1},
    }.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = joined([out])
    assert [(run["variant"], run["seed"]) for run in data["runs"]] == [
        ("full", 0),
        ("full", 1),
        ("learned-sinks", 0),
    ]
    assert len(data["runs"][0]["curve"]) == 2
    assert set(data["runs"][0]["applied"]) >= {"window", "strided"}


def run(variant: str, seed: int, bits: float) -> dict:
    return {"variant": variant, "seed": seed, "python": {"bits_per_byte": bits}}


def test_noise_and_differences_by_hand() -> None:
    data = {"runs": [run("full", 0, 1.0), run("full", 1, 1.2), run("window", 0, 2.0)]}
    data["runs"].append(run("window", 1, 2.4))
    runs = by_variant(data)
    noise, free = seed_noise(runs, "python")
    assert free == 2
    assert noise == pytest.approx(((0.02 + 0.08) / 2) ** 0.5)
    gap, half = difference(runs, "window", "full", "python")
    assert gap == pytest.approx(1.1)
    assert half == pytest.approx(4.303 * noise)


def test_the_article_s_claim_has_the_measured_figures() -> None:
    runs = by_variant(json.loads((ROOT / RESULTS).read_text()))
    whole = mean_bits(runs["full"], "python")
    claim = claims()[-1]
    for name, kind in (
        ("window", "window"),
        ("strided", "strided"),
        ("blockwise", "blockwise"),
        ("longformer", "Longformer"),
    ):
        assert (
            f"{kind} {mean_bits(runs[name], 'python') / whole - 1:+.0%}".replace("%", " %")
            in claim.right
        )
    gap, half = difference(runs, "hybrid", "full", "python")
    assert abs(gap) < half
    made = [run["applied"] for run in runs["full"].values()]
    for name, stated in (("window", "16 %"), ("blockwise", "71 %")):
        mean = sum(run[name]["python"] for run in made) / len(made)
        assert f"{mean / whole - 1:.0%}".replace("%", " %") == stated
        assert stated in claim.why


def test_the_document_holds_the_results_tables() -> None:
    data = json.loads((ROOT / RESULTS).read_text())
    text = (ROOT / "docs/variants.md").read_text()
    assert filled(text, data) == text
    with pytest.raises(ValueError, match="no place for pairs"):
        filled(text.replace("<!-- pairs -->", ""), data)
