"""Recordings: each token's life against plain oracles, and its surprise against `stream`."""

import copy
import io
import json
import math
from array import array
from pathlib import Path
from typing import Any

import pytest

from attnspan.cache import Dense, Int4, Int8
from attnspan.cli import main
from attnspan.evaluation.stream import stream_text
from attnspan.evaluation.texts import english_heldout
from attnspan.explorer import recording
from attnspan.explorer.lives import Lives, Watched
from attnspan.explorer.record import HEAD, KEPT, LAYER, LIMIT, allowed, cut, kept, record, watched
from attnspan.models.loading import load
from attnspan.policies import Compressive, HeavyHitter, Policy, SinkWindow, SnapKV, parse

TEXT = english_heldout().encode()
TOKENS = 400
HEAVY = HeavyHitter(heavy=40, window=50, block=32)
SNAP = SnapKV(heavy=40, window=50, observed=8, block=32)


@pytest.fixture(scope="module")
def bundled() -> Any:
    return load("bundled", "cpu")


def lives(bundled: Any, spec: str, tokens: int = TOKENS) -> tuple[list[int], list[int]]:
    with watched(*bundled, TEXT, parse(spec), Dense(), limit=tokens, chunk=100) as run:
        while run.step():
            pass
        return list(run.lives.left), list(run.lives.pooled)


def banded(tokens: int, sinks: int, window: int, block: int) -> list[int]:
    """The oracle of windows: at each grid point all but the sinks and the last `window - 1` go."""
    left = [0] * tokens
    for seen in range(block, tokens + 1, block):
        for i in range(sinks, seen - (window - 1)):
            left[i] = left[i] or seen
    return left


@pytest.mark.parametrize(
    ("spec", "sinks", "window", "block"),
    [
        ("window:64", 0, 64, 1),
        ("window:50,block=16", 0, 50, 16),
        ("sinks:4+window:60", 4, 60, 1),
        ("sinks:3+window:60,block=7", 3, 60, 7),
        ("sinks:8+window:1", 8, 1, 1),
    ],
)
def test_windows(bundled: Any, spec: str, sinks: int, window: int, block: int) -> None:
    left, pooled = lives(bundled, spec, 200)
    assert left == banded(200, sinks, window, block)
    assert not any(pooled)


def test_a_token_leaves_a_window_as_many_tokens_later(bundled: Any) -> None:
    left, _ = lives(bundled, "window:64", 200)
    assert left == [i + 64 if i + 64 <= 200 else 0 for i in range(200)]


def test_nothing_leaves_a_cache_that_keeps_all(bundled: Any) -> None:
    left, pooled = lives(bundled, "keep-all", 150)
    assert left == pooled == [0] * 150


def groups(tokens: int, policy: Compressive) -> tuple[list[int], list[int]]:
    """The oracle of pooling, from the policy's description: group by group, grid point by point."""
    left, pooled = [0] * tokens, [0] * tokens
    whole: list[range] = []  # groups that have left the window, oldest first
    for seen in range(policy.block, tokens + 1, policy.block):
        before = len(whole)
        while True:
            first = policy.sinks + len(whole) * policy.rate
            if first + policy.rate > seen - (policy.window - 1):
                break
            whole.append(range(first, first + policy.rate))
        for g, group in enumerate(whole):
            stays = g >= len(whole) - policy.memory
            for i in group:
                if stays and g >= before:
                    pooled[i] = seen
                elif not stays:
                    left[i] = left[i] or seen
    return left, pooled


@pytest.mark.parametrize(
    "spec",
    [
        "compressive:window=40,memory=16,rate=4",
        "compressive:window=33,memory=5,rate=3,sinks=2,block=16",
        "compressive:window=8,memory=2,rate=2,block=16",  # a block brings more than memory has
        "compressive:window=40,memory=16,rate=4,pooling=most-used",
    ],
)
def test_pooling(bundled: Any, spec: str) -> None:
    policy = parse(spec)
    assert isinstance(policy, Compressive)
    assert lives(bundled, spec) == groups(TOKENS, policy)


@pytest.mark.parametrize(("policy", "head"), [(HEAVY, 0), (HEAVY, 1), (SNAP, 1)])
def test_heavy_hitters(bundled: Any, policy: HeavyHitter | SnapKV, head: int) -> None:
    """The oracle is what the cache itself says of its slots after each grid point."""
    layer, left = 2, [0] * TOKENS
    found = watched(
        *bundled, TEXT, policy, Dense(), layer=layer, head=head, limit=TOKENS, chunk=policy.block
    )
    with found as run:
        before: set[int] = set()
        more = True
        while more:
            more = run.step()
            lane = run.stream.cache.caches[layer].lanes[0]
            if lane.seen % policy.block == 0:
                now = set(lane.extra["positions"][0, head, : lane.tokens_held, 0].tolist())
                for i in (before | set(range(lane.seen - policy.block, lane.seen))) - now:
                    left[i] = lane.seen
                before = now
        assert list(run.lives.left) == left
        # More than the window's tokens are old by the end: some were heavy hitters indeed.
        assert sum(not t for t in left[: TOKENS - 200]) > 10


def test_heads_differ_and_the_oracle_tells(bundled: Any) -> None:
    told = []
    for head in (0, 1):
        with watched(*bundled, TEXT, HEAVY, Dense(), layer=2, head=head, limit=TOKENS) as run:
            while run.step():
                pass
            told.append(run.lives.left)
    assert told[0] != told[1]


@pytest.mark.parametrize("spec", ["window:64", "heavy:40+window:50,block=32", "sinks:4+window:60"])
def test_as_many_are_alive_as_the_cache_holds(bundled: Any, spec: str) -> None:
    with watched(*bundled, TEXT, parse(spec), Dense(), limit=TOKENS, chunk=90) as run:
        while run.step():
            pass
        for look in run.looks:
            if look.tokens % 32:  # at a grid point the cache has decided, and the query hasn't come
                p = look.tokens - 1
                alive = sum(i <= p and not 0 < t <= p for i, t in enumerate(run.lives.left))
                assert alive == look.held


@pytest.mark.parametrize(
    ("spec", "storage"),
    [
        ("keep-all", Dense()),
        ("window:64", Dense()),
        ("sinks:4+window:60", Int4()),
        ("heavy:40+window:50,block=32", Dense()),
        ("compressive:window=40,memory=16,rate=4", Int8()),
    ],
)
def test_the_surprise_is_that_of_stream(bundled: Any, spec: str, storage: Any) -> None:
    policy = parse(spec)
    made = record(*bundled, TEXT, [(policy, storage)], title="a text", limit=400, chunk=128)
    row = stream_text(*bundled, io.BytesIO(TEXT[:400]), policy, storage, limit=400, chunk=128)[
        "rows"
    ][0]
    run = made["runs"][0]
    assert (run["nll_mean"], run["tokens"]) == (row["nll"], row["tokens"])
    assert run["perplexity"][-1] == pytest.approx(row["perplexity"], abs=1e-5)
    assert run["looks"]["tokens"] == [128, 256, 384, 400]
    assert max(run["looks"]["held"]) <= row["tokens_held"]
    codes = recording.unpack(run["nll"])
    # A code is off by half a step of the square root: at 25 nats by 0.1, near 0 by 0.0001.
    assert sum(recording.nlls(codes)) / 400 == pytest.approx(row["nll"], abs=0.01)


def test_a_recording_is_whole_and_reads_back(bundled: Any, tmp_path: Path) -> None:
    specs = ["window:64", "compressive:window=40,memory=16,rate=4", "heavy:40+window:50,block=32"]
    made = record(*bundled, TEXT, [kept(s) for s in specs], title="a text", limit=300)
    file = tmp_path / "A Text.json"
    file.write_text(json.dumps(made))
    held = recording.gather([file])["a-text"]
    assert held == made
    assert recording.unpack(held["text"]) == TEXT[:300]
    for run, spec in zip(held["runs"], specs, strict=True):
        left, pooled = lives(bundled, spec, 300)
        assert recording.unpack_lives(run["left"], run["block"]) == left
        if any(pooled):
            assert recording.unpack_lives(run["pooled"], run["block"]) == pooled
        else:
            assert run["pooled"] is None
    assert [each["policy"] for each in recording.head(held, "a-text")["runs"]] == specs


def test_damage_is_seen(bundled: Any) -> None:
    made = record(*bundled, TEXT, [kept("window:64")], title="a text", limit=100)
    recording.check(made, "x")
    for change in (
        {"format": "something"},
        {"version": 2},
        {"tokens": 101},
        {"text": "!"},
        {"text": recording.pack(b"short")},
        {"runs": [{}]},
        {"runs": None},
        {"runs": []},
        {"meta": None},
        {"title": "\ud800"},
        {"layer": True},
        {"meta": {"date": math.nan}},
    ):
        with pytest.raises(ValueError, match=r"recording"):
            recording.check({**copy.deepcopy(made), **change}, "x")
    without = copy.deepcopy(made)
    del without["meta"]
    with pytest.raises(ValueError, match="it is not whole"):
        recording.check(without, "x")
    for change in ({"rate": 0}, {"block": 0}, {"looks": {}}, {"perplexity": []}, {"sinks": "4"}):
        worse = copy.deepcopy(made)
        worse["runs"][0] |= change
        with pytest.raises(ValueError, match=r"recording x: it"):
            recording.check(worse, "x")
    made["runs"][0]["left"] = recording.pack(bytes(8))
    with pytest.raises(ValueError, match="don't fit"):
        recording.check(made, "x")


def test_a_bomb_is_refused() -> None:
    with pytest.raises(ValueError, match="damaged"):
        recording.unpack(recording.pack(bytes(1 << 23)))


def test_what_cannot_be_recorded(bundled: Any) -> None:
    for spec, word in (
        ("layers(window:4; window:8)", "several budgets"),
        ("heads(keep-all; window:8)", "several budgets"),
        ("window:1000000", "slots"),
        ("window", "window"),
    ):
        with pytest.raises(ValueError, match=word):
            allowed(spec)
    for how, word in (({"layer": 10}, "layer is 10"), ({"head": 2}, "head is 2")):
        with (
            pytest.raises(ValueError, match=word),
            watched(*bundled, TEXT, SinkWindow(4, 60), Dense(), **how),
        ):
            pass


def test_a_watched_policy_is_the_policy() -> None:
    policy = HeavyHitter(8, 8)
    seen = Watched(policy, Lives())
    assert str(seen) == str(policy)
    own = {name for name in vars(Policy) if isinstance(getattr(Policy, name), property)}
    for each in (policy, SnapKV(8, 8), Compressive(8, 2, 2)):
        for name in {*own, "block"}:
            assert getattr(Watched(each, Lives()), name) == getattr(each, name), name


def test_news_come_once() -> None:
    told = Lives()
    told.roll(SinkWindow(1, 2).band, 1, 5)
    assert told.news() == [(1, 3, 0), (2, 4, 0), (3, 5, 0)]
    assert told.news() == []
    assert told.left == array("I", [0, 3, 4, 5, 0])


def test_a_text_is_cut_between_characters() -> None:
    assert cut("aé".encode(), 2) == b"a"
    assert cut(b"ab", 2) == b"ab"


def test_the_shipped_recordings() -> None:
    files = recording.shipped()
    assert "python" in files
    assert sum(path.stat().st_size for path in files.values()) < 3_000_000
    for path in files.values():
        found = recording.read(path)
        assert found["tokens"] == LIMIT
        assert len(found["runs"]) >= 4
        assert {"date", "versions", "device"} <= found["meta"].keys()
        assert (found["layer"], found["head"]) == (LAYER, HEAD)
        text = recording.unpack(found["text"])
        text.decode()
        for run in found["runs"]:
            policy = parse(run["policy"])
            left = recording.unpack_lives(run["left"], run["block"]) if run["left"] else []
            if (band := getattr(policy, "band", None)) and band.window is not None:
                assert left == banded_fast(run["tokens"], band.sinks, band.window, run["block"])
            if isinstance(policy, Compressive):
                pooled = recording.unpack_lives(run["pooled"], run["block"])
                assert len(left) == len(pooled) == run["tokens"]
                assert all(p <= t for p, t in zip(pooled, left, strict=True) if p and t)
    assert [
        f"{r['policy']} {r['storage']}".removesuffix(" dense")
        for r in recording.read(files["python"])["runs"]
    ] == list(KEPT)


def banded_fast(tokens: int, sinks: int, window: int, block: int) -> list[int]:
    ends = [-(-(i + window) // block) * block for i in range(tokens)]
    return [end if i >= sinks and end <= tokens else 0 for i, end in enumerate(ends)]


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "made.json"
    text.write_bytes(TEXT[:500])
    given = ["explore", "--record", str(file), "--text", str(text), "--limit", "200"]
    given += ["--policy", "window:64 int8", "--policy", "keep-all", "--layer", "1", "--head", "0"]
    assert main(given) == 0
    assert "200 tokens, 2 runs" in capsys.readouterr().out
    found = recording.read(file)
    assert found["title"] == "text.txt"
    assert (found["layer"], found["head"], found["tokens"]) == (1, 0, 200)
    assert [run["storage"] for run in found["runs"]] == ["int8", "dense"]
    assert found["meta"]["command"] == "explore --record"


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["--record", "x.json", "--limit", "100001"], "--limit is 100001"),
        (["--record", "x.json", "--text", "no such file"], "no such file"),
        (["--record", "x.json", "--policy", "window"], "window"),
        (["--record", "x.json", "--policy", "window:8 int2"], "int2"),
        (["--record", "x.json", "--export", "y.html"], "one of the two"),
        (["--layer", "3"], "--layer is given without --record"),
        (["--policy", "window:8"], "--policy is given without --record"),
        (["--recording", "no such file"], "no such file"),
        (["--port", "70000"], "--port is 70000"),
    ],
)
def test_what_the_command_refuses(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["explore", *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert word in err
    assert not list(tmp_path.iterdir())


def test_tokens_that_are_not_bytes(bundled: Any) -> None:
    with watched(*bundled, TEXT, SinkWindow(4, 60), Dense(), limit=50) as run:
        run.text = b"another text"
        with pytest.raises(ValueError, match="not bytes"):
            run.step()
