"""The stream's scores are those of one plain forward; snapshots go on bit for bit."""

import io
import itertools

import pytest
import torch
from tiny import tiny_llama
from transformers import AutoTokenizer

from attnspan.cache import Dense, Int8
from attnspan.evaluation import report, saving
from attnspan.evaluation.loop import Progress, Stream, continuation, run, trained_length
from attnspan.evaluation.stream import stream_text
from attnspan.evaluation.text import TextReader
from attnspan.models import Cache, attach, bundled
from attnspan.policies import KeepAll, SinkWindow, Window, parse

TEXT = ("def window(keys, size):\n    return keys[-size:]\n\n" * 7).encode()
TOKENIZER = AutoTokenizer.from_pretrained(bundled.path())
BOS = 256
POLICIES = [
    "window:24",
    "sinks:4+window:20",
    "heavy:12+window:9,block=16",
    "compressive:window=16,memory=8,rate=4,block=16",
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab_size=264, bos_token_id=BOS, eos_token_id=None)


def reader(text=TEXT):
    return TextReader(io.BytesIO(text), TOKENIZER)


def plain_nlls(model, ids):
    """One float64 forward of the untouched model over the whole text."""
    model = tiny_llama(vocab_size=264).double()
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_scores_equal_one_plain_forward(model, bos, chunk):
    """Fed once each, scored once each, BOS first and unscored."""
    ids = [*([BOS] if bos else []), *TEXT[:60]]
    expected = plain_nlls(model, ids)
    cache = Cache(model, KeepAll())
    watch = [1, 2, 17, len(ids) - 1]
    with attach(model):
        source = reader(TEXT[:60])
        stream = Stream(model, cache, source, first=bos, chunk=chunk, watch=watch)
        run(stream)
    assert stream.score.tokens == len(ids) - 1
    assert stream.score.bytes == len(ids) - 1
    # fp32 logits of size about 10 through two layers: 2e-5, the project's tolerance for logits.
    assert stream.score.nll == pytest.approx(float(expected.sum()), abs=4e-5 * len(ids))
    assert stream.watched == pytest.approx([float(expected[t - 1]) for t in watch], abs=4e-5)
    assert cache.tokens_seen == len(ids) - 1
    assert stream.pending == ids[-1]


def test_the_oracle_can_fail(model):
    ids = [BOS, *TEXT[:60]]
    shifted = plain_nlls(model, [*ids[:30], ids[31], ids[30], *ids[32:]])
    assert abs(float(shifted.sum() - plain_nlls(model, ids).sum())) > 0.01


@pytest.mark.parametrize("limit", [1, 15, 16, 33, 10_000])
def test_limit_counts_the_tokens_scored(model, limit):
    seen: list[Progress] = []
    with attach(model):
        stream = Stream(model, Cache(model, Window(24)), reader(), first=BOS, limit=limit, chunk=16)
        run(stream, seen.append)
    assert stream.score.tokens == min(limit, len(TEXT))
    assert seen[-1].done == stream.score.tokens
    assert [p.done for p in seen] == sorted(p.done for p in seen)


@pytest.mark.parametrize(
    ("name", "value"),
    [("limit", 0), ("limit", -1), ("chunk", 0), ("chunk", 1.5), ("seed", -1), ("seed", 2**63)],
)
def test_sizes_are_checked(model, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Stream(model, Cache(model, Window(4)), reader(), first=BOS, **{name: value})


def test_ids_that_the_model_has_not(model):
    small = tiny_llama(vocab_size=64)
    with attach(small):
        stream = Stream(small, Cache(small, Window(4)), reader(), first=None)
        with pytest.raises(ValueError, match="don't belong together"):
            run(stream)


class Killed(Exception):
    pass


def figures(result):
    """All that a stream comes to, but for its time."""
    row = {k: v for k, v in result["rows"][0].items() if k != "tokens_per_second"}
    details = {k: v for k, v in result["meta"]["details"][0].items() if k != "seconds"}
    return row, details


def streamed(model, policy, storage, report=None, **more):
    more = {"chunk": 16, "save_every": 40, "generate": 12, **more}
    return stream_text(
        model, TOKENIZER, io.BytesIO(TEXT), parse(policy), storage, report=report, **more
    )


@pytest.mark.parametrize("storage", [Dense(), Int8()], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_killed_stream_goes_on_bit_for_bit(model, policy, storage, tmp_path):
    """Killed at each step in turn, each time from the last snapshot on."""
    expected = figures(streamed(model, policy, storage))
    for survived in itertools.count(1):
        steps = itertools.count(1)

        def kill(_, steps=steps, survived=survived):
            if next(steps) > survived:
                raise Killed

        resume = tmp_path if (tmp_path / "snapshot.json").exists() else None
        try:
            result = streamed(model, policy, storage, kill, save_to=tmp_path, resume_from=resume)
        except Killed:
            continue
        assert figures(result) == expected
        break
    assert survived > 2
    # The snapshot at the end lies at the last whole step; going on from it changes nothing.
    assert figures(streamed(model, policy, storage, resume_from=tmp_path)) == expected


@pytest.mark.parametrize("limit", [5, 16, 100])  # before the first whole step, at it, and later
def test_a_longer_limit_goes_on_as_if_never_stopped(model, tmp_path, limit):
    streamed(model, POLICIES[1], Dense(), limit=limit, save_to=tmp_path, generate=5)
    went_on = streamed(model, POLICIES[1], Dense(), limit=250, resume_from=tmp_path)
    assert figures(went_on) == figures(streamed(model, POLICIES[1], Dense(), limit=250))


def test_a_snapshot_that_lost_a_token_shows(model, tmp_path, monkeypatch):
    """The oracle can fail: one pending token off, and the figures differ."""
    expected = figures(streamed(model, POLICIES[1], Dense()))
    streamed(model, POLICIES[1], Dense(), limit=100, save_to=tmp_path)
    real = saving.snapshot.read

    def forged(folder):
        tensors, meta = real(folder)
        return tensors, {**meta, "pending": meta["pending"] + 1}

    monkeypatch.setattr(saving.snapshot, "read", forged)
    assert figures(streamed(model, POLICIES[1], Dense(), resume_from=tmp_path)) != expected


def test_what_is_not_the_same_stream_is_refused(model, tmp_path):
    streamed(model, POLICIES[1], Dense(), limit=100, save_to=tmp_path)
    other = tiny_llama(seed=1, vocab_size=264, bos_token_id=BOS, eos_token_id=None)
    for wanted, match in [
        ((model, POLICIES[0], Dense()), "policy"),
        ((model, POLICIES[1], Int8()), "storage"),
        ((other, POLICIES[1], Dense()), "model"),
    ]:
        with pytest.raises(ValueError, match=match):
            streamed(*wanted, resume_from=tmp_path)
    for more, match in [
        ({"chunk": 8}, "it was saved with chunk 16; this stream has 8"),
        ({"seed": 5}, "it was saved with seed 0; this stream has 5"),
        ({"limit": 30}, "limit is 30; .* has scored 96 tokens already"),
    ]:
        with pytest.raises(ValueError, match=match):
            streamed(model, POLICIES[1], Dense(), resume_from=tmp_path, **more)
    with pytest.raises(ValueError, match="holds a snapshot already"):
        streamed(model, POLICIES[1], Dense(), save_to=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no snapshot\.json"):
        streamed(model, POLICIES[1], Dense(), resume_from=tmp_path / "none")
    saving.snapshot.write(tmp_path / "foreign", {}, {"some": "thing"})
    with pytest.raises(ValueError, match="it is not of a stream"):
        streamed(model, POLICIES[1], Dense(), resume_from=tmp_path / "foreign")


def test_keep_all_stops_at_the_trained_length(model):
    assert trained_length(model) == 64
    result = streamed(model, "keep-all", Dense())
    assert result["rows"][0]["tokens"] == 64
    assert "stopped after 64 tokens" in result["meta"]["details"][0]["notes"][0]
    assert result["meta"]["details"][0]["continuation"] is None
    short = streamed(model, "keep-all", Dense(), limit=60)
    assert short["meta"]["details"][0]["notes"] == []
    assert 0 < len(short["meta"]["details"][0]["continuation"]) <= 4  # 64 - 60 bytes


def test_a_cache_beyond_the_trained_length_is_noted(model):
    notes = streamed(model, "window:100", Dense())["meta"]["details"][0]["notes"]
    assert "holds 100 tokens, more than the 64 positions" in notes[0]


def test_continuations_end_at_eos_and_are_reproducible(model):
    def drawn(seed, stop=frozenset()):
        with attach(model):
            cache = Cache(model, SinkWindow(4, 20))
            stream = Stream(model, cache, reader(), first=BOS, limit=50, seed=seed)
            run(stream)
            return stream.generate(20, stop)

    first = drawn(3)
    assert len(first) == 20
    assert drawn(3) == first
    assert drawn(4) != first
    assert drawn(3, frozenset([first[5]])) == first[: first.index(first[5])]
    with attach(model):
        stream = Stream(model, Cache(model, SinkWindow(4, 20)), reader(), first=BOS, limit=50)
        run(stream)
        assert continuation(stream, TOKENIZER, 0) is None


def test_rows_have_exactly_the_keys(model):
    result = streamed(model, POLICIES[0], Dense())
    assert list(result["rows"][0]) == [
        "policy",
        "storage",
        "tokens",
        "nll",
        "perplexity",
        "bits_per_byte",
        "cache_bytes_peak",
        "tokens_held",
        "tokens_per_second",
        "perplexity_ratio",
    ]
    assert result["rows"][0]["perplexity_ratio"] is None
    assert report.trained_length(model) == result["meta"]["model"]["trained_length"]
