"""Tune on a tiny model: bytes, losses, what a choice may see, going on after an interruption."""

import io
import json
import math

import pytest
import torch

from attnspan.cache import Dense, Int8
from attnspan.evaluation.intervals import by_passage, paired, ratio
from attnspan.evaluation.tasks import TASKS, Passkey, StreamingNll
from attnspan.evaluation.tune import quality as quality_of
from attnspan.evaluation.tune import run as running
from attnspan.evaluation.tune import state as states
from attnspan.evaluation.tune import tune
from attnspan.evaluation.tune.measure import FULL, Ledger
from attnspan.evaluation.tune.space import FAMILIES, STORAGES, Choice
from attnspan.evaluation.tune.state import State
from attnspan.models import attach
from attnspan.planner.configs import from_config
from attnspan.policies import KeepAll, PerHead, PerLayer, SinkWindow

LENGTH = 128
SMALL = {"length": LENGTH, "passages": 4, "families": ("sinks",), "storages": (Dense(), Int8())}


def ledger(model, ids, part="choosing", told=lambda count: None):
    return Ledger(model, from_config(model.config.to_dict()), ids, part, State(None, {}), told)


def passages(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, LENGTH), generator=generator).tolist()


def test_bytes_are_those_of_the_cache(tiny_tuned):
    """`_run` holds the closed form against the cache; here for all that may be chosen."""
    model, _ = tiny_tuned
    book = ledger(model, passages(2))
    policies = [make(budget) for make in FAMILIES.values() for budget in (24, 96)]
    policies += [
        KeepAll(),
        PerLayer((SinkWindow(4, 28), FAMILIES["heavy"](64))),
        PerHead((SinkWindow(4, 28), FAMILIES["snap"](64))),
    ]
    with attach(model):
        for policy in policies:
            for storage in STORAGES.values():
                book.losses(Choice(policy, storage), 1)


def test_bytes_that_are_off_are_no_result(tiny_tuned, monkeypatch):
    model, _ = tiny_tuned
    book = ledger(model, passages(2))
    monkeypatch.setattr(book, "bytes", lambda choice: (1, 2))
    with attach(model), pytest.raises(RuntimeError, match="where 6 are counted on"):
        book.nlls(FULL, 2)


def test_losses_are_those_of_the_model_itself(tiny_tuned):
    """A full forward scores the second half of each passage alike, whatever goes beside it."""
    model, _ = tiny_tuned
    ids = passages(7)
    book = ledger(model, ids)
    with attach(model):
        found = book.nlls(FULL, 7)
        assert book.losses(FULL, 7) == [0.0] * 7
    with torch.inference_mode():
        logits = model(torch.tensor(ids)).logits[:, LENGTH // 2 - 1 : -1].double()
    wanted = torch.tensor(ids)[:, LENGTH // 2 :]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    assert found == pytest.approx(nll.mean(1).tolist(), abs=1e-5)


def test_values_don_t_depend_on_what_was_asked_before(tiny_tuned):
    model, _ = tiny_tuned
    choice = Choice(SinkWindow(4, 28), Int8())
    told = []
    with attach(model):
        once = ledger(model, passages(9)).nlls(choice, 9)
        book = ledger(model, passages(9), told=told.append)
        book.nlls(choice, 4)
        book.nlls(choice, 4)
        assert book.nlls(choice, 9) == once
    assert told == [4, 4, 1]


def test_intervals_of_passages():
    gaps = [0.01, 0.02, 0.06, -0.01]
    found = by_passage(gaps)
    deviation = math.sqrt(sum((gap - 0.02) ** 2 for gap in gaps) / 3)
    assert found.ratio == pytest.approx(math.exp(0.02))
    assert found.high == pytest.approx(math.exp(0.02 + 3.182 * deviation / 2))
    # Of equal passages, the ratio's interval is that of the mean.
    other = ratio([2 + gap for gap in gaps], [2.0] * 4)
    assert other.high == pytest.approx(1 + math.log(found.high) / 2)
    # Where what is lost goes with what there is to lose, the ratio is sure.
    sure = ratio([1.02, 2.04, 3.06], [1.0, 2.0, 3.0])
    assert (sure.low, sure.high) == pytest.approx((1.02, 1.02))
    assert by_passage([0.01]).high > 1e300
    # More than Student's table has rows for: neighbours together, as blocks of a long text are.
    many = [0.01 * (i % 5) for i in range(64)]
    tokens = [gap for gap in many for _ in range(64)]
    assert by_passage(many).high == pytest.approx(paired(tokens, [0.0] * len(tokens)).high)


def test_a_result_is_whole(tiny_tuned, text):
    model, tokenizer = tiny_tuned
    result = tune(model, tokenizer, text(), max_loss=0.3, **SMALL)
    json.dumps(result, allow_nan=False)
    full = result["full"]
    # 2 layers, 2 KV heads of 32, keys and values of float32.
    assert full["bytes"] == LENGTH * 2 * 2 * 32 * 2 * 4
    chosen = result["chosen"]
    assert chosen["bytes"] == min(each["bytes"] for each in result["tested"] if each["holds"])
    assert chosen["times_fewer"] == full["bytes"] / chosen["bytes"]
    assert all(pair["high"] <= 1.3 for pair in chosen["held_out"].values())
    assert set(chosen["held_out"]) == {"perplexity", "nll"}
    for each in result["candidates"]:
        assert each["passages"] == 4
        assert each["perplexity"]["low"] <= each["perplexity"]["ratio"]
    assert result["meta"]["counts"] == ["perplexity", "nll"]


def test_a_memory_is_kept(tiny_tuned, text):
    model, tokenizer = tiny_tuned
    result = tune(model, tokenizer, text(), memory=20_000, **SMALL)
    chosen = result["chosen"]
    assert chosen["bytes"] <= 20_000
    fitting = [c for c in result["candidates"] if c["bytes"] <= 20_000]
    assert len(fitting) > 1
    assert len(result["tested"]) == 1
    assert chosen["held_out"]["perplexity"]["ratio"] > 0


def test_nothing_holds(tiny_tuned, text, monkeypatch):
    """What held where it was chosen and not on the other part isn't taken."""
    model, tokenizer = tiny_tuned
    of = running.Quality.of

    def worse(self, choice):
        found = of(self, choice)
        return (
            found
            if self.ledger.part == "choosing"
            else tuple(
                running.Paired(pair.ratio + 1, pair.low + 1, pair.high + 1) for pair in found
            )
        )

    monkeypatch.setattr(running.Quality, "of", worse)
    result = tune(model, tokenizer, text(), max_loss=0.3, **SMALL)
    assert result["chosen"] is None
    assert next(each["holds"] for each in result["tested"]) is False


def test_the_second_half_has_no_part_in_the_choice(tiny_tuned, text):
    model, tokenizer = tiny_tuned
    size = 6000
    kept = text(size).read()
    first = tune(model, tokenizer, text(size), max_loss=0.3, **SMALL)
    # Another second half: the same is asked of it, in the same order.
    other = io.BytesIO(kept[:3200] + kept[3200:][::-1])
    second = tune(model, tokenizer, other, max_loss=0.3, **SMALL)
    assert first["candidates"] == second["candidates"]
    assert [each["policy"] for each in first["tested"]] == [
        each["policy"] for each in second["tested"]
    ]
    assert first["full"]["nll_held_out"] != second["full"]["nll_held_out"]


def test_passages_are_apart(tiny_tuned, text):
    _, tokenizer = tiny_tuned
    first, second = running._parts(text(), tokenizer, "text", 256, LENGTH, 8)
    assert len(first) == len(second) == 8
    assert all(len(ids) == LENGTH and ids[0] == 256 for ids in first + second)
    data = text().read()
    places = [[data.index(bytes(ids[1:])) for ids in part] for part in (first, second)]
    assert len(set(places[0] + places[1])) == 16
    assert max(places[0]) + LENGTH - 1 <= min(places[1])
    assert places[0][0] < places[0][2] < places[0][1] < places[0][3]  # the first ones are spread


class Killed(BaseException):
    """Nothing catches it, as nothing catches a signal that kills."""


@pytest.mark.parametrize("writes", [1, 2, 9, 30, -1])
def test_what_was_interrupted_goes_on_to_the_same_end(
    writes, tiny_tuned, text, tmp_path, monkeypatch
):
    model, tokenizer = tiny_tuned
    whole = tune(model, tokenizer, text(), max_loss=0.3, **SMALL)
    file, count, write = tmp_path / "state.json", 0, states.write_file

    def cut(path, data):
        nonlocal count
        count += 1
        write(path, data)
        if count == writes:
            raise Killed

    monkeypatch.setattr(states, "write_file", cut)
    if writes == -1:  # at the end: everything is known
        tune(model, tokenizer, text(), max_loss=0.3, state=file, **SMALL)
    else:
        with pytest.raises(Killed):
            tune(model, tokenizer, text(), max_loss=0.3, state=file, **SMALL)
    before = count
    again = tune(model, tokenizer, text(), max_loss=0.3, state=file, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    for each in (whole, again):
        del each["meta"]["date"]
    assert again == whole
    assert (count == before) == (writes == -1)


def test_a_state_of_something_else_is_refused(tiny_tuned, text, tmp_path):
    model, tokenizer = tiny_tuned
    file = tmp_path / "state.json"
    tune(model, tokenizer, text(), max_loss=0.3, state=file, **SMALL)
    before = file.read_bytes()
    for more, size, named in (
        ({"length": 64}, 6000, "another length, 128; 64 is asked for"),
        ({"passages": 5}, 6000, "another passages"),
        ({}, 5000, "another text"),
    ):
        with pytest.raises(ValueError, match=named) as refused:
            tune(model, tokenizer, text(size), max_loss=0.3, state=file, **{**SMALL, **more})
        assert "\n" not in str(refused.value)
    kept = model.config.max_position_embeddings
    model.config.max_position_embeddings = 256
    try:
        with pytest.raises(ValueError, match="another model"):
            tune(model, tokenizer, text(), max_loss=0.3, state=file, **SMALL)
    finally:
        model.config.max_position_embeddings = kept
    assert file.read_bytes() == before
    for data in (b"{}", b"no JSON", b'{"format": "attnspan tune 1"}'):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="new name"):
            tune(model, tokenizer, text(), max_loss=0.3, state=file, **SMALL)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({}, "neither is given"),
        ({"max_loss": 0.02, "memory": 10**6}, "both are given"),
        ({"max_loss": 2.0}, "max_loss is 2.0"),
        ({"memory": 100}, "memory is 100 bytes; the smallest cache that is tried, sinks:4"),
        ({"max_loss": 0.1, "length": 129}, "length is 129; at most 128"),
        ({"max_loss": 0.1, "length": 63}, "length is 63; at least 64"),
        ({"max_loss": 0.1, "passages": 3}, "passages is 3"),
        ({"max_loss": 0.1, "families": ("sink",)}, "family 'sink' is not known"),
        ({"max_loss": 0.1, "tasks": ()}, "tasks is empty"),
        ({"max_loss": 0.1, "tasks": (Passkey(), Passkey(depths=(1.0,)))}, "tasks has passkey 2"),
    ],
)
def test_bad_arguments(more, sentence, tiny_tuned, text):
    model, tokenizer = tiny_tuned
    with pytest.raises(ValueError, match=sentence):
        tune(model, tokenizer, text(), **{**SMALL, **more})


def test_a_short_text(tiny_tuned, text):
    model, tokenizer = tiny_tuned
    with pytest.raises(ValueError, match="it has 1,000 tokens; 1,016 or more are needed"):
        tune(model, tokenizer, text(1000), max_loss=0.1, **SMALL)


def test_a_storage_that_can_t_hold_the_heads_is_left_out():
    fitting, left_out = running._fitting(tuple(STORAGES.values()), [24, 24])
    assert [str(each) for each in fitting] == ["dense", "int8"]
    assert left_out[0]["storage"] == "int4"


def test_tasks_that_the_model_can_t_do_are_left_out(tiny_tuned, text):
    model, tokenizer = tiny_tuned
    tasks = (StreamingNll(), TASKS["common-words"], TASKS["copy"])
    result = tune(model, tokenizer, text(), max_loss=0.3, tasks=tasks, examples=2, **SMALL)
    assert result["meta"]["counts"] == ["perplexity", "nll"]
    assert {each["task"] for each in result["left_out"]} == {"common-words", "copy"}
    with pytest.raises(ValueError, match="can do none of them"):
        tune(model, tokenizer, text(), max_loss=0.3, tasks=tasks[1:], examples=2, **SMALL)


def test_losses_of_tasks(tiny_tuned, monkeypatch):
    """Accuracy in parts of the full cache's, prompt by prompt, on the settings that it can do."""
    from attnspan.evaluation.tasks.intervals import Rate
    from attnspan.evaluation.tasks.runner import Result
    from attnspan.evaluation.tune.quality import Quality

    def result(depth, values, low):
        rate = Rate(sum(values) / len(values), low, 1.0)
        setting = (("depth", depth),)
        return Result(setting, 0.1, rate, tuple(values), 4, 0.0, (1, 1), less=False)

    small = Choice(SinkWindow(4, 4), Dense())
    known = {
        FULL: [result(0.0, [1, 1, 1, 0], 0.3), result(1.0, [0, 0, 0, 1], 0.05)],
        small: [result(0.0, [1, 1, 0, 0], 0.3), result(1.0, [1, 1, 1, 1], 0.9)],
    }
    model, _ = tiny_tuned
    quality = Quality(
        ledger(model, passages(2)), False, [TASKS["passkey"]], lambda task, choice: known[choice]
    )
    (left,) = quality.find_used()
    assert left["setting"] == {"depth": 1.0}
    assert quality.names == ["passkey"]
    (lost,) = quality.of(small)
    assert lost.ratio == pytest.approx(1 + 1 / 3)  # of three right answers one is lost
    assert lost.low < lost.ratio < lost.high
    # Three answers that both get right: by Wilson, 3.84 / (3 + 3.84) of them may be lost.
    assert quality.of(FULL)[0].high == pytest.approx(1 + 3.8415 / 6.8415, rel=1e-4)
    with pytest.raises(ValueError, match=r"3 right answers .* loss of 2.000%.* 251 or more"):
        quality.check(0.02, examples=4)
    quality.check(0.6, examples=4)


@pytest.mark.parametrize(("wrong", "most"), [(0, 1.0188), (1, 1.0277), (10, 1.0895)])
def test_few_lost_answers_are_no_proof_of_none(wrong, most):
    """Of 200 answers, by the interval of a share (Wilson 1927)."""
    full = [(1.0,) * 5] * 40
    own = [(0.0 if i < wrong else 1.0, *(1.0,) * 4) for i in range(40)]
    found = quality_of._lost(own, full)
    assert found.ratio == pytest.approx(1 + wrong / 200)
    assert found.high >= most
    assert found.high < most + 0.003
    # Gains elsewhere don't make up for what may be lost.
    gained = [(*each[:4], 1.0) for each in own]
    assert quality_of._lost(gained, [(*each[:4], 0.0) for each in full]).high > found.high - 0.02


def test_nothing_right_tells_nothing():
    assert quality_of._lost([(0.0,), (1.0,)], [(0.0,), (0.0,)]).high > 1e300


def test_intervals_take_neighbours_of_the_text_together(tiny_tuned, monkeypatch):
    model, _ = tiny_tuned
    quality = quality_of.Quality(ledger(model, passages(5)), True, [], lambda *_: [])
    places = quality_of.spread(5)
    monkeypatch.setattr(
        type(quality.ledger),
        "nlls",
        lambda self, choice, count: [float(place + (choice == FULL)) for place in places[:count]],
    )
    seen = []
    monkeypatch.setattr(quality_of, "ratio", lambda own, full: seen.append((own, full)))
    for count in (5, 3):
        quality.text(Choice(SinkWindow(4, 4), Dense()), count)
        own, full = seen.pop()
        assert own == sorted(places[:count])
        assert full == [place + 1 for place in own]
