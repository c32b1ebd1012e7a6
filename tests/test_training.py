"""The script that made the bundled model: its data rule, its model, and a run of a few steps."""

import doctest
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from training import corpus, english
from training.batches import Text
from training.evaluation import recompute_nll, stream_nll
from training.export import export
from training.licences import Owner
from training.model import Llama, Shape
from training.sinks import Penalty, attention_to_bos
from training.tokenizer import BOS, EOS

ROOT = Path(__file__).parents[1]
TINY = Shape(width=32, layers=2, heads=4, kv_heads=2, ffn=48, length=64)


def source(seed: int, lines: int = 40) -> str:
    """Python of which no two seeds share a long line."""
    return "".join(
        f"value_of_{seed}_abcdef_{i} = compute_something('{seed}')\n" for i in range(lines)
    )


def library(folder: Path) -> Path:
    """A folder that looks like a standard library, with installed packages beside it."""
    for name, text in {
        "os.py": source(1),
        "json/decoder.py": source(2),
        "json/same.py": source(2),
        "asyncio/events.py": source(3),
        "test/test_asyncio/test_events.py": source(4),
        "copied.py": source(3, 20) + source(5, 20),
        "site-packages/free/core.py": source(6),
        "site-packages/bound/core.py": source(7),
        "site-packages/free/http/client.py": source(8),
        "site-packages/unlisted.py": source(9),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name, licence in {"free": "MIT", "bound": "GPL-3.0-or-later"}.items():
        info = folder / "site-packages" / f"{name}-1.0.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n"
        (info / "METADATA").write_text(metadata + f"License-Expression: {licence}\n")
        listed = [f"{name}/core.py", f"{name}/http/client.py", f"{name}-1.0.dist-info/METADATA"]
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in listed))
    return folder


def tiny_model() -> Llama:
    """Random weights that bfloat16 holds exactly, large enough for uneven attention."""
    torch.manual_seed(0)
    model = Llama(TINY, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 5).bfloat16().float())
    return model


def test_the_examples_in_the_rule_run() -> None:
    assert doctest.testmod(corpus).failed == 0


def test_training_reads_each_free_text_once_and_nothing_held_out(tmp_path: Path) -> None:
    root = library(tmp_path / "lib")
    found = corpus.build([root / "site-packages", root], processes=1)
    texts = {text.decode() for text in found.trained}
    assert texts == {source(1), source(2), source(6)}
    assert len(found.trained) == 3
    assert [text.decode() for text in found.held_out] == [source(3)]
    assert {(row["name"], row["licence"], row["files"]) for row in found.sources} == {
        ("Python", "PSF-2.0", 2),
        ("free", "MIT", 1),
    }
    assert found.left_out == ["bound (GPL-3.0-or-later)"]


def test_a_near_copy_counts_by_its_long_lines() -> None:
    known = corpus.long_lines(source(3).encode())
    assert corpus.repeats((source(3, 20) + source(5, 20)).encode(), known)
    assert not corpus.repeats((source(3, 10) + source(5, 30)).encode(), known)


@pytest.mark.parametrize(
    ("licence", "free"),
    [
        ("MIT License", True),
        ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", True),
        ("BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1", True),
        ("Python Software Foundation License", True),
        ("LGPL-2.1", False),
        ("BSD License; GNU General Public License (GPL)", False),
        ("MPL-2.0 AND MIT", False),
        ("LicenseRef-NVIDIA-SOFTWARE-LICENSE", False),
        ("not stated", False),
    ],
)
def test_only_permissive_licences_are_read(licence: str, free: bool) -> None:
    assert Owner("name", "1", licence).permissive is free


def test_english_is_held_out_by_whole_proposals_past_the_border() -> None:
    def proposal(number: int, size: int, terms: str = "public domain") -> str:
        return f"PEP: {number}\nTitle: x\n\n" + "word " * (size // 5) + f"\n{terms}\n\n"

    first, across, last = proposal(1, 1000), proposal(2, 1000), proposal(3, 200_000)
    odd, again = proposal(4, 5000, "all rights reserved"), proposal(3333, 194_500)
    text = first + across + last + odd + again
    assert len(first) < len(text) - english.HELD_OUT_BYTES < len(first + across)
    assert english.split_english(text) == ([first], [last])


def test_rows_begin_with_bos_and_documents_end_with_eos() -> None:
    text = Text([b"ab", b"cde"], torch.device("cpu"))
    assert text.starts.tolist() == [0, 3]
    assert text.rows(torch.tensor([0, 3]), 4).tolist() == [
        [BOS, 97, 98, EOS, 99],
        [BOS, 99, 100, 101, EOS],
    ]


def test_the_export_is_the_model_that_was_trained(tmp_path: Path) -> None:
    model = tiny_model()
    export(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rows = torch.randint(0, 256, (3, 33))
    with torch.no_grad():
        ours = model.nll(model.trunk(rows[:, :-1])[0], rows[:, 1:])
        logits = theirs(rows[:, :-1]).logits
    nll = torch.nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="none")
    # Both compute in float32, in another order; 33 tokens and 2 layers leave it under 1e-4.
    torch.testing.assert_close(ours, nll, atol=1e-4, rtol=0)


def test_a_cache_that_holds_all_changes_nothing_and_a_small_one_does() -> None:
    model = tiny_model()
    rows = torch.randint(0, 256, (2, 50))
    with torch.no_grad():
        full = model.nll(model.trunk(rows[:, :-1])[0], rows[:, 1:])
    torch.testing.assert_close(stream_nll(model, rows, 64, 4), full, atol=1e-4, rtol=0)
    assert not torch.allclose(stream_nll(model, rows, 16, 4), full, atol=1e-3)


def test_in_one_layer_a_bounded_cache_equals_a_forward_over_what_it_holds() -> None:
    model = tiny_model()
    del model.blocks[1]
    row = torch.randint(0, 256, (1, 40))
    cache, sinks = 12, 3
    streamed = stream_nll(model, row, cache, sinks)[0]
    for t in range(39):
        held = [*range(sinks), *range(t - cache + sinks + 1, t + 1)] if t >= cache else range(t + 1)
        inputs = row[:, list(held)]
        with torch.no_grad():
            nll = model.nll(model.trunk(inputs)[0][:, -1:], row[:, t + 1 : t + 2])
        torch.testing.assert_close(streamed[t], nll[0, 0], atol=1e-4, rtol=0)


def test_recomputing_puts_bos_before_the_latest_tokens() -> None:
    model = tiny_model()
    row = torch.randint(0, 256, (1, 80))
    inputs = torch.cat([torch.tensor([[BOS]]), row[:, 54:65]], 1)
    with torch.no_grad():
        expected = model.nll(model.trunk(inputs)[0][:, -1:], row[:, 65:66])[0]
    found = recompute_nll(model, row, cache=12, every=100)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_attention_to_bos_is_even_in_a_model_without_queries() -> None:
    model = tiny_model()
    with torch.no_grad():
        for block in model.layers():
            block.qkv[: TINY.heads * TINY.head_dim] = 0
    text = Text([b"x" * 200], torch.device("cpu"))
    expected = sum(1 / (t + 1) for t in range(32, 64)) / 32
    attention = attention_to_bos(model, text, rows=2)
    torch.testing.assert_close(attention, torch.full((2, 4), expected))


def test_the_penalty_waits_rises_and_is_taken_back_once_there_are_sinks() -> None:
    penalty = Penalty(0.03)
    assert penalty(0.2) == 0
    assert math.isclose(penalty(0.27), 0.015)
    penalty.steer(0.27, 1.0)
    assert penalty(0.5) == 0.03
    penalty.steer(0.5, 0.6)
    assert math.isclose(penalty(0.5), 0.03 * 0.85)
    penalty.steer(0.5, 0.5)
    assert math.isclose(penalty(0.5), 0.03 * 0.85)
    penalty.steer(0.5, 0.1)
    penalty.steer(0.5, 0.1)
    assert penalty(0.5) == 0.03


def test_a_short_run_learns_and_writes_a_model_that_loads(tmp_path: Path) -> None:
    root = library(tmp_path / "lib")
    (tmp_path / "english.txt").write_text("word " * 81_000)
    out = tmp_path / "out"
    numbers = {
        "steps": 12,
        "warmup": 2,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "ffn": 64,
        "length": 64,
        "batch": 8,
        "probe_every": 6,
        "stream_rows": 2,
        "stream_bytes": 128,
    }
    command = [sys.executable, "-m", "training.train", "--device", "cpu", "--python", str(root)]
    command += ["--english", str(tmp_path / "english.txt"), "--out", str(out)]
    for name, number in numbers.items():
        command += ["--" + name.replace("_", "-"), str(number)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)

    result = json.loads((out / "evaluation.json").read_text())
    assert result["run"]["steps"] == 12
    # Byte text without training costs log2(264) = 8.04 bits.
    assert result["python"]["bits_per_byte"] < 7.5
    assert len((out / "train.log").read_text().splitlines()) == 6
    assert json.loads((out / "corpus.json").read_text())["python_documents"] == 2
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.hidden_size == 32
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
