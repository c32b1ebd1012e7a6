"""The runner: the whole cache first, no policy judged by what it can't do, everything paired."""

import json

import pytest
from tiny import tiny_llama

from attnspan.cache import Dense, Int8
from attnspan.evaluation.tasks import Copy, Needle, Passkey, StreamEval, StreamingNll
from attnspan.evaluation.tasks.intervals import Rate
from attnspan.evaluation.tasks.runner import Result, check_length, judge, lost, named, score
from attnspan.models.loading import load
from attnspan.policies import KeepAll, SinkWindow, Window


@pytest.fixture(scope="module")
def bundled():
    return load("bundled", "cpu")


@pytest.fixture(scope="module")
def random_model():
    return tiny_llama(vocab_size=264, max_position_embeddings=1024)


def result(value=0.5, low=0.4, high=0.6, chance=0.1, less=False, values=(0.5,)):
    return Result((), chance, Rate(value, low, high), values, 10, 0.0, (1, 2), less)


def test_what_a_model_can():
    assert result(low=0.11).can
    assert not result(low=0.1).can
    assert result(high=2.9, chance=3.0, less=True).can
    assert not result(high=3.0, chance=3.0, less=True).can


def test_what_a_policy_loses():
    whole, own = result(values=(1.0, 0.5)), result(values=(0.5, 0.25))
    assert lost(own, whole) == Rate(0.375, 0.125, 0.625)
    more = result(values=(3.0, 2.0), less=True), result(values=(2.0, 2.0), less=True)
    assert lost(*more).value == 0.5


def test_the_bundled_model_and_a_window(bundled):
    model, tokenizer = bundled
    tasks = [Passkey((0.25,)), Copy((256,)), StreamEval((5,))]
    # Ten layers of 16 reach 150 tokens.
    kept = [(Window(16), Dense()), (KeepAll(), Dense()), (KeepAll(), Int8())]
    found = judge(model, tokenizer, tasks, kept, length=400, examples=4)
    json.dumps(found, allow_nan=False)
    rows = {(row["task"], *row["setting"].values()): row for row in found["rows"]}
    for key in (("passkey", 0.25), ("copy", 256)):
        assert rows[key]["used"], key
        names = [(r["policy"], r["storage"]) for r in rows[key]["results"]]
        assert names == [("keep-all", "dense"), ("window:16", "dense"), ("keep-all", "int8")]
        assert all(len(r["prompts"]) == 4 for r in rows[key]["results"])
    whole, window, int8 = rows["copy", 256]["results"]
    assert whole["low"] > 0.5
    assert window["low"] <= 1 / 64
    assert window["lost"]["low"] > 0.3
    assert int8["value"] > 0.5
    # No policy runs where the whole cache is not surely above chance.
    left = {left["task"] for left in found["left_out"]}
    assert left == {"streameval"}
    for row in found["rows"]:
        assert (len(row["results"]) == 3) is row["used"]


def test_a_random_model_is_left_out(random_model, bundled):
    seen = []
    tasks = [Passkey((0.5,)), Copy((64,)), StreamingNll(), Needle(depths=(0.5,))]
    kept = [(Window(64), Dense())]
    found = judge(random_model, bundled[1], tasks, kept, length=400, examples=6, report=seen.append)
    assert not any(row["used"] for row in found["rows"])
    assert all(len(row["results"]) == 1 for row in found["rows"])
    assert len(found["left_out"]) == len(found["rows"]) == 1 + 1 + 4 + 1
    assert "not surely above chance, 0.100" in found["left_out"][0]["why"]
    assert "not surely less than" in found["left_out"][2]["why"]
    assert (seen[-1].done, seen[-1].total) == (8, 8)
    accuracy = [row for row in found["rows"] if row["measure"] == "accuracy"]
    for row in accuracy:
        assert row["results"][0]["low"] <= row["chance"] <= row["results"][0]["high"]


def test_without_the_rule_it_would_be_judged(random_model, bundled, monkeypatch):
    """Mutation: the model can do everything; then the policy runs, and the test above fails."""
    monkeypatch.setattr(Result, "can", True)
    found = judge(
        random_model, bundled[1], [Passkey((0.5,))], [(Window(64), Dense())], length=400, examples=2
    )
    assert len(found["rows"][0]["results"]) == 2


def test_a_task_that_does_not_fit_is_left_out(random_model, bundled):
    found = judge(random_model, bundled[1], [Passkey((0.5,))], [], length=100, examples=2)
    assert found["rows"] == []
    assert found["left_out"][0]["setting"] is None
    assert "length is 100" in found["left_out"][0]["why"]


def test_nll_is_that_of_a_stream(bundled):
    """The parts, weighed by their tokens, are the mean of a plain forward's losses."""
    import torch

    model, tokenizer = bundled
    task = StreamingNll(parts=2)
    options = {"length": 300, "examples": 2, "seed": 4}
    whole = score(model, tokenizer, task, KeepAll(), **options)
    windowed = score(model, tokenizer, task, SinkWindow(4, 28), **options)
    passages = task.passages(tokenizer, tokenizer.bos_token_id, 300, 2, 4)
    assert [passage.name for passage in passages] == ["English", "Python"]
    for i, passage in enumerate(passages):
        ids = torch.tensor([passage.ids])
        with torch.inference_mode():
            plain = float(model(input_ids=ids, labels=ids).loss)
        parts = [r.values[i] for r in whole]
        assert (149 * parts[0] + 150 * parts[1]) / 299 == pytest.approx(plain, rel=1e-4)
    assert [r.setting for r in whole] == [(("from", 1), ("to", 149)), (("from", 150), ("to", 299))]
    assert lost(windowed[1], whole[1]).low > 0
    chosen = [whole[1].setting]
    assert score(model, tokenizer, task, KeepAll(), settings=chosen, **options) == whole[1:]


def test_settings_and_seeds(random_model, bundled):
    options = {"length": 300, "examples": 3}
    task = Passkey((0.0, 1.0))
    both = score(random_model, bundled[1], task, KeepAll(), **options)
    one = score(random_model, bundled[1], task, KeepAll(), settings=[(("depth", 1.0),)], **options)
    assert one == both[1:]
    assert both == score(random_model, bundled[1], task, KeepAll(), **options)


def test_bad_input(random_model, bundled):
    tokenizer = bundled[1]
    with pytest.raises(ValueError, match="length is 1025; at most 1024 is allowed"):
        judge(random_model, tokenizer, [Passkey()], [], length=1025)
    with pytest.raises(ValueError, match="examples is 1; a whole number of at least 2"):
        judge(random_model, tokenizer, [Passkey()], [], examples=1)
    with pytest.raises(ValueError, match="seed is -1"):
        judge(random_model, tokenizer, [Passkey()], [], seed=-1)
    with pytest.raises(ValueError, match=r"task 'pass' is not known; allowed are nll, passkey"):
        named("copy,pass")
    assert check_length(random_model, None) == 1024
    assert check_length(random_model, 7) == 7
