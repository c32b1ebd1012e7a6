"""The side by side of caches: its worker over the two libraries that are here, and its tables."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from attnspan.evaluation.tasks import Writer
from attnspan.evaluation.texts import python_heldout
from attnspan.models import bundled
from attnspan.models.loading import load

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULT = BENCHMARKS / "results" / "cache_peers.json"
SETTING = {
    "name": "text",
    "few": False,
    "whole": True,
    "grown": 0,
    "budget": 64,
    "context": 128,
    "first": 129,
    "passages": "passages",
    "rows": 2,
    "most": 192,
}


class Modules(NamedTuple):
    driver: ModuleType
    worker: ModuleType
    report: ModuleType
    attnspan: ModuleType
    transformers: ModuleType


@pytest.fixture(scope="module")
def modules():
    names = "cache_peers", "cache_peers_worker", "cache_peers_report"
    names += "cache_peers_attnspan", "cache_peers_transformers"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield Modules(*map(importlib.import_module, names))


@pytest.fixture(scope="module")
def ids() -> list[list[int]]:
    data = python_heldout().encode()
    return [[256, *data[start : start + 192]] for start in (5000, 90_000)]


@pytest.fixture(scope="module")
def measured(modules, ids):
    given = {
        "model": str(bundled.path()),
        "threads": torch.get_num_threads(),
        "only": "",
        "known": [],
        "settings": [SETTING],
        "passages": ids,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules.worker, "LAST", 20)  # more than a block
        return _rows(modules, given)


def _rows(modules, given):
    return {
        row["row"]: row
        for library in ("attnspan", "transformers")
        for row in modules.worker.measure(library, given)
        # Those need packages that aren't among ours.
        if "quanto" not in row["row"] and "hqq" not in row["row"]
    }


def nll(tokens: list[int], **changes) -> float:
    model = AutoModelForCausalLM.from_pretrained(bundled.path(), dtype=torch.bfloat16, **changes)
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0, 128:].double()
    return float(nn.functional.cross_entropy(logits, torch.tensor(tokens[129:])))


def test_whole_caches_are_a_forward_by_hand(measured, ids):
    by_hand = [nll(tokens) for tokens in ids]
    for name in ("keep-all", "DynamicCache", "StaticCache"):
        assert measured[name]["nll"] == pytest.approx(by_hand, abs=0.01), name
    # It can fail: a token less to be scored.
    assert abs(nll(ids[0][:-1]) - by_hand[0]) > 0.01


def test_windows_of_both_libraries_are_the_same(modules, measured, ids, monkeypatch):
    """Their own rows, in float32: in bfloat16 keys that are turned by other angles differ."""
    ours, theirs = measured["window:64"], measured["DynamicCache, sliding_window"]
    path, exact = str(bundled.path()), torch.float32
    model = modules.attnspan.llama(path, exact)
    narrow = modules.transformers.sliding(path, 64, exact)
    monkeypatch.setattr(modules.attnspan, "llama", lambda _: model)
    monkeypatch.setattr(modules.transformers, "sliding", lambda *_: narrow)

    def nlls(library, name, **changes):
        rows = library.rows(path, {**SETTING, **changes})
        (row,) = [each for each in rows if each.name == name]
        with torch.inference_mode():
            return modules.worker.passages(row, ids, 128, 129, 2)

    expected = nlls(modules.transformers, "DynamicCache, sliding_window")
    for window in (63, 64, 65):
        found = nlls(modules.attnspan, f"window:{window}", budget=window)
        off = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        assert off < 1e-5 if window == 64 else off > 0.005, (window, off)
    assert min(ours["nll"]) > max(measured["keep-all"]["nll"])
    # Theirs holds one token less, its own, and the memory of the whole prompt until the next one.
    assert theirs["bytes"]["end"] == pytest.approx(64 * 5120, rel=0.02)
    assert theirs["bytes"]["after_context"] == pytest.approx(128 * 5120, rel=0.02)


def test_bounded_rows_keep_to_their_bytes(measured):
    rows = [r for r in measured.values() if r["kind"] == "bounded" and "sliding" not in r["row"]]
    assert len(rows) >= 9
    for row in rows:
        assert "error" not in row
        # A ring has a few slots beside its window, and heavy hitters have a score a slot.
        assert row["bytes"]["most"] <= 64 * 5120 * 1.2, row["row"]
    assert measured["DynamicCache"]["bytes"] == {
        "after_context": 128 * 5120,
        "most": 192 * 5120,
        "end": 192 * 5120,
    }


def test_bytes_are_those_of_memory(modules):
    whole = torch.zeros(10, dtype=torch.float32)
    module = nn.Linear(3, 3)
    count = modules.worker.nbytes
    assert count([whole[:2], {"a": [whole[5:]]}, module]) == 40
    assert count([(torch.zeros(2), torch.zeros(3, dtype=torch.int8))]) == 11

    class Slotted:
        __slots__ = ("kept",)

    thing = Slotted()
    thing.kept = torch.zeros(4)
    assert count([thing, thing]) == 16


def test_bytes_of_our_caches_are_what_they_say(modules, ids):
    model = modules.attnspan.llama(str(bundled.path()))
    for policy, storage in modules.attnspan.specs(64, 192):
        session = modules.attnspan.Attached(model, policy, storage, 0)
        with torch.inference_mode():
            session.context(torch.tensor(ids)[:, :150])
        assert modules.worker.nbytes(session.held()) == session.cache.nbytes
        session.close()


@pytest.mark.parametrize("name", ["sinks:4+window:60", "StaticCache", "DynamicCache"])
def test_what_was_tried_is_taken_back(modules, ids, name):
    library = modules.attnspan if ":" in name else modules.transformers
    (row,) = (r for r in library.rows(str(bundled.path()), SETTING) if r.name == name)
    tokens = torch.tensor(ids)

    def after(*tried: Tensor) -> Tensor:
        session = row.opened(5)
        with torch.inference_mode():
            session.context(tokens[:, :100])
            for one in tried:
                session.tried(one)
            found = session.feed(tokens[:, 100:110])
        session.close()
        return found

    plain = after()
    torch.testing.assert_close(after(tokens[:, 3:8], tokens[:, 40:43]), plain, atol=0.1, rtol=0.02)


class Told:
    """A session whose every logit is for the next token of a list that it knows."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.at = rows, 0

    def context(self, ids: Tensor) -> None:
        self.at = ids.shape[1]

    def feed(self, ids: Tensor) -> Tensor:
        found = self.tried(ids)
        self.at += ids.shape[1]
        return found

    def tried(self, ids: Tensor) -> Tensor:
        start, stop = self.at + 1, self.at + 1 + ids.shape[1]
        wanted = torch.tensor([(row + [0] * 9)[start:stop] for row in self.rows])
        return 10.0 * nn.functional.one_hot(wanted, 264).float()

    def close(self) -> None:
        pass


def test_an_oracle_answers_all_and_one_that_is_a_token_off_does_not(modules):
    _, tokenizer = load("bundled", "cpu")
    prompts = modules.driver.prompts(Writer(tokenizer, 256), 1)
    for task, made in prompts.items():
        assert len(made) == 5
        if task == "passkey":
            rows = [[*p["context"], *p["question"], *p["choices"][p["right"]]] for p in made]
            assert {len(row) for row in rows} == {1024}
            assert bytes(rows[0][-16:-6]).endswith(b"key is")
        else:
            rows = [[*p["context"], *p["question"]] for p in made]
        off = [[*row[1:], 0] for row in rows]
        for known, least, most in ((rows, 1, 1), (off, 0, 0.3)):
            row = modules.worker.Row("told", "whole", lambda _, known=known: Told(known))
            right = modules.worker.answers(row, made, len(made))
            assert least <= sum(map(sum, right)) / sum(map(len, right)) <= most


def test_ratios_fronts_and_names(modules):
    report = modules.report
    found = report.ratio({"nll": [1.0, 2.0]}, {"nll": [0.5, 1.0]})
    # Gaps of 0.5 and 1: their mean is 0.75, its standard error 0.25.
    assert (found.value, found.low, found.high) == pytest.approx(
        (math.exp(0.75), math.exp(0.25), math.exp(1.25))
    )
    rows = [
        {"bytes": {"most": size}, "nll": [value], "row": name}
        for name, size, value in (("a", 4, 1.0), ("b", 2, 3.0), ("c", 3, 3.5), ("d", 8, 0.5))
    ]

    def measured(row):
        return report.Rate(row["nll"][0], 0, 0)

    assert [row["row"] for row in report.front(rows, measured, False)] == ["b", "a", "d"]
    assert [row["row"] for row in report.front(rows, measured, True)] == ["b", "c"]
    heads = "heads(window:8; keep-all)"
    name = f"layers(window:8; window:8; {heads}; {heads}; window:8)"
    assert report.short(name) == f"layers(2 x window:8; 2 x {heads}; window:8)"


def test_tables_and_picture_are_those_of_the_results(modules):
    result = json.loads(RESULT.read_text())
    document = (ROOT / "docs" / "cache-peers.md").read_text()
    assert modules.report.tables(result, document) == document
    with pytest.raises(ValueError, match="no place for the table"):
        modules.report.tables(result, "")
    rows = {(r["library"], r["setting"], r["budget"], r["row"]): r for r in result["rows"]}
    assert len(rows) == len(result["rows"])
    assert {row["library"] for row in result["rows"]} == set(modules.driver.PACKAGES)
    assert RESULT.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_libraries_agree_where_they_keep_everything(modules):
    """The same model and tokens in three environments; what differs is rounding in bfloat16."""
    result = json.loads(RESULT.read_text())
    whole = modules.report.base(result, "text")
    for row in result["rows"]:
        if row["setting"] == "text" and row["row"] in ("keep-all", "DynamicCache", "StaticCache"):
            assert modules.report.ratio(row, whole).value == pytest.approx(1, abs=2e-3)
