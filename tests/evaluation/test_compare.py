"""`recompute` is what it says, one plain forward a position; rows and ratios follow from it."""

import io
import itertools
import json
import math
import sys

import pytest
import torch
from tiny import tiny_llama
from transformers import AutoTokenizer

from attnspan.cache import Dense, Int8
from attnspan.evaluation import plot as plots
from attnspan.evaluation.compare import Replay, Tokens, compare
from attnspan.evaluation.files import check_file, to_json, write_file
from attnspan.evaluation.recompute import ratio, recompute, spaced
from attnspan.evaluation.text import TextReader
from attnspan.models import bundled
from attnspan.policies import KeepAll, SinkWindow, Window, parse_list

TEXT = ("def window(keys, size):\n    return keys[-size:]\n\n" * 5).encode()
TOKENIZER = AutoTokenizer.from_pretrained(bundled.path())
BOS = 256


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=264, bos_token_id=BOS, eos_token_id=None)


def by_hand(ids, held, positions, bos):
    """Float64, one forward for each position, the context cut out as the issue words it."""
    model = tiny_llama(vocab_size=264).double()
    nlls = []
    for t in positions:
        before = ids[:t]
        if len(before) > held:
            before = [ids[0], *before[len(before) - (held - 1) :]] if bos else before[-held:]
        with torch.no_grad():
            logits = model(torch.tensor([before]), use_cache=False).logits[0, -1]
        nlls.append(float(-logits.log_softmax(-1)[ids[t]]))
    return nlls


@pytest.mark.parametrize("held", [1, 2, 20, 63])
@pytest.mark.parametrize("bos", [True, False])
def test_recompute_equals_a_forward_for_each_position(model, held, bos):
    ids = [BOS, *TEXT[:90]]
    positions = [1, 2, 3, 19, 20, 21, 22, 50, 63, 64, 90]
    told = []
    got = recompute(model, lambda a, b: ids[a:b], held, positions, bos=bos, report=told.append)
    # fp32 logits of a two-layer model: 2e-5, the project's tolerance for logits, at either side.
    assert got == pytest.approx(by_hand(ids, held, positions, bos), abs=4e-5)
    assert told[-1] == len(positions)
    if held == 20:  # the oracle can fail: without BOS, or one token short, the figures differ
        for wrong in (by_hand(ids, held, positions, not bos), by_hand(ids, 19, positions, bos)):
            assert got != pytest.approx(wrong, abs=1e-3)


@pytest.mark.parametrize(("tokens", "count"), [(1, 4), (4, 4), (5, 4), (1000, 256), (257, 256)])
def test_positions_are_evenly_spaced(tokens, count):
    positions = spaced(tokens, count)
    assert len(set(positions)) == len(positions) == min(tokens, count)
    assert (positions[0], positions[-1]) == (1, tokens)
    gaps = {b - a for a, b in itertools.pairwise(positions)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_ratio_and_its_paired_error():
    streamed, fresh = [1.0, 2.0, 4.0], [0.5, 2.0, 3.0]
    got = ratio(streamed, fresh, held=8)
    assert got.ratio == pytest.approx(math.exp(0.5))
    assert got.standard_error == pytest.approx(math.exp(0.5) * math.sqrt(0.25 / 3))
    assert ratio([1.0], [1.0], 8).standard_error is None


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("limit", [None, 1, 30, 10_000])
def test_tokens_are_read_once_and_replayed(bos, limit):
    reader = TextReader(io.BytesIO(TEXT), TOKENIZER)
    expected = [*([bos] if bos else []), *TEXT][: None if limit is None else limit + 1]
    tokens = Tokens(io.BytesIO(), reader, bos, limit)
    assert tokens.count == len(expected)
    assert tokens.ids(0, tokens.count) == expected
    assert tokens.ids(1, 2) == expected[1:2]
    replay = Replay(tokens)
    ids, widths = replay.read(7)
    more, rest = replay.read(10_000)
    assert ids + more == expected
    assert widths + rest == [0 if bos and i == 0 else 1 for i in range(len(expected))]
    assert replay.read(3) == ([], [])


def compared(model, policies, storages=None, **more):
    kept = [(policy, storage) for policy in policies for storage in storages or [Dense()]]
    return compare(model, TOKENIZER, io.BytesIO(TEXT), kept, chunk=16, **more)


def test_rows_of_a_comparison(model):
    policies = [KeepAll(), *parse_list("window:24, sinks:4+window:20, heavy:8+window:9,block=8")]
    result = compared(model, policies, (Dense(), Int8()), generate=6)
    rows, details = result["rows"], result["meta"]["details"]
    assert [(row["policy"], row["storage"]) for row in rows] == [
        (str(policy), storage) for policy in policies for storage in ("dense", "int8")
    ]
    assert [row["tokens"] for row in rows] == [64, 64] + [len(TEXT)] * 6
    assert [row["tokens_held"] for row in rows] == [64] * 2 + [24] * 6
    # Everything kept and held dense is the fresh forward itself.
    assert rows[0]["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    for row, detail in zip(rows, details, strict=True):
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
        assert row["bits_per_byte"] == pytest.approx(row["nll"] / math.log(2))
        assert row["cache_bytes_peak"] >= max(detail["series"]["cache_bytes"]) > 0
        assert detail["recompute"]["positions"] == min(256, row["tokens"])
        assert detail["recompute"]["ratio"] == row["perplexity_ratio"]
        assert detail["last_quarter"]["tokens"] == row["tokens"] // 4
        assert detail["series"]["tokens"][-1] == row["tokens"]
    assert rows[1]["cache_bytes_peak"] < rows[0]["cache_bytes_peak"] / 2
    assert details[0]["notes"]
    assert details[0]["continuation"] is None
    assert details[2]["continuation"]
    assert json.loads(to_json(result)) == result
    for kind in plots.FORMATS:
        assert len(plots.plot(result, kind)) > 10_000


def test_a_windows_ratio_is_its_own(model):
    """`Window(C)` streams what a window of C sees layer by layer: its ratio is not exactly 1."""
    result = compared(model, [Window(24)])
    assert result["rows"][0]["perplexity_ratio"] != pytest.approx(1, abs=1e-4)


def test_limit(model):
    result = compared(model, [SinkWindow(4, 20)], limit=30)
    assert result["rows"][0]["tokens"] == 30
    assert result["meta"]["details"][0]["recompute"]["positions"] == 30
    assert plots.plot(result)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_text_shorter_than_two_tokens(model, tokens):
    with pytest.raises(ValueError, match=f"text text: it has {tokens} tokens; two or more"):
        compare(model, TOKENIZER, io.BytesIO(b"x" * tokens), [(Window(4), Dense())])


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    write_file(path, b"one")
    (tmp_path / "link.json").symlink_to(path)
    write_file(tmp_path / "link.json", b"two")
    assert path.read_bytes() == b"two"
    assert (tmp_path / "link.json").is_symlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr("os." + call, full)
            with pytest.raises(OSError, match="No space left"):
                write_file(path, b"three")
        assert path.read_bytes() == b"two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "out.json"]
    with pytest.raises(OSError, match="No space left"):
        write_file("/dev/full", b"four")
    for wrong, match in [
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "x", "there is no folder"),
    ]:
        with pytest.raises(OSError, match=match):
            check_file(wrong)


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch):
    assert plots.check_plot("a/b.PNG") == "png"
    with pytest.raises(ValueError, match=r"ends in \.png, \.svg, \.pdf"):
        plots.check_plot("b.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"attnspan\[plot\]"):
        plots.check_plot("b.png")
