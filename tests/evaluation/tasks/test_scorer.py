"""The scorer: an oracle gets 1, a random model chance, and a real one what plain forwards give."""

import math
import random

import pytest
import torch
from tiny import tiny_llama

from attnspan.evaluation.tasks import TASKS, Example, Probe, Writer
from attnspan.evaluation.tasks.scorer import CacheSession, batches, play, rollback
from attnspan.models import Cache, attach
from attnspan.patterns import SlidingWindow
from attnspan.policies import HeavyHitter, KeepAll, SinkWindow, Window

CHOICES = {name: task for name, task in TASKS.items() if name != "nll"}
VOCABULARY = 264


class Told:
    """A session that keeps what each row was fed, and asks `after` for logits."""

    def __init__(self, after):
        self._after, self._rows, self._sizes = after, [], []

    def feed(self, ids, last):
        self._rows = self._rows or [[] for _ in ids]
        self._sizes = [len(row) for row in self._rows]
        logits = torch.zeros(len(ids), last, VOCABULARY)
        first = ids.shape[1] - last
        for r, row in enumerate(self._rows):
            for column, token in enumerate(ids[r].tolist()):
                row.append(token)
                if column >= first:
                    logits[r, column - first] = self._after(tuple(row))
        return logits

    def undo(self, columns):
        for row, size in zip(self._rows, self._sizes, strict=True):
            del row[size:]


def oracle(examples, forgets=math.inf):
    """Knows the generator: before each token of an answer, after just what the example holds there.

    With `forgets`, it knows an answer only so many tokens after it was last seen.
    """
    known = {
        example.ids[: probe.at + i]: token
        for example in examples
        for probe in example.probes
        if probe.distance <= forgets
        for i, token in enumerate(probe.answer)
    }

    def after(history):
        logits = torch.zeros(VOCABULARY)
        if history in known:
            logits[known[history]] = 10.0
        return logits

    return after


def dice(history):
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(hash(history) % 2**32))


def outcomes(session_after, examples, rows=4):
    found = []
    for batch in batches(examples, rows):
        played = play(Told(session_after), batch)
        assert [len(each) for each in played] == [len(example.probes) for example in batch]
        found += [outcome for each in played for outcome in each]
    return found


def made(name, bytewise, length=880, count=3):
    return list(CHOICES[name].examples(Writer(bytewise, 256), length, count, seed=0))


@pytest.mark.parametrize("name", CHOICES)
def test_an_oracle_is_always_right(name, bytewise):
    examples = made(name, bytewise, count=2)
    found = outcomes(oracle(examples), examples)
    assert all(outcome.right and outcome.exact for outcome in found)
    # Mutation: one that forgets is not, at least where answers lie far.
    forgetful = outcomes(oracle(examples, forgets=150), examples)
    assert not all(outcome.exact for outcome in forgetful)
    assert not all(outcome.right for outcome in forgetful)


@pytest.mark.parametrize("name", CHOICES)
def test_a_random_model_is_at_chance(name, bytewise):
    examples = made(name, bytewise, count=4 if name == "copy" else 20)
    probes = [probe for example in examples for probe in example.probes]
    found = outcomes(dice, examples)
    chance = sum(probe.chance for probe in probes) / len(probes)
    rate = sum(outcome.right for outcome in found) / len(found)
    assert abs(rate - chance) < 4 * (chance * (1 - chance) / len(found)) ** 0.5
    assert sum(outcome.exact for outcome in found) < 0.05 * len(found)


def crowd(seed, count, length=60):
    """Examples of random tokens whose candidates have one to four tokens."""
    draw = random.Random(seed)
    examples = []
    for _ in range(count):
        ids = [draw.randrange(64) for _ in range(length)]
        probes = []
        for at in (20, 25, 26, 33, 50, 56):
            size = 1 if at in (25, 26) else draw.randint(1, 4)
            candidates = {tuple(ids[at : at + size])}
            while len(candidates) < 4:
                wide = 1 if at in (25, 26) else draw.randint(1, 4)
                candidates.add(tuple(draw.randrange(64) for _ in range(wide)))
            order = sorted(candidates)
            right = order.index(tuple(ids[at : at + size]))
            probes.append(Probe(at, tuple(order), right, ((0, 1),)))
        examples.append(Example(tuple(ids), tuple(probes)))
    return examples


def plainly(model, examples):
    """Each candidate in a fresh forward after the example's own tokens."""
    found = []
    for example in examples:
        for probe in example.probes:
            scores, exact = [], False
            for i, candidate in enumerate(probe.candidates):
                ids = torch.tensor([[*example.ids[: probe.at], *candidate]])
                with torch.inference_mode():
                    logits = model(input_ids=ids, use_cache=False).logits[0]
                logits = logits[probe.at - 1 : -1].double()
                own = torch.tensor(candidate)
                scores.append(float(logits.log_softmax(-1).gather(1, own[:, None]).sum()))
                if i == probe.right:
                    exact = bool((logits.argmax(-1) == own).all())
            found.append((max(range(len(scores)), key=scores.__getitem__) == probe.right, exact))
    return found


def through(model, policy, examples, rows=3):
    found = []
    with attach(model):
        for batch in batches(examples, rows):
            cache = Cache(model, policy, rollback=rollback(batch))
            for each in play(CacheSession(model, cache), batch):
                found += [(outcome.right, outcome.exact) for outcome in each]
            assert cache.tokens_seen == batch[0].probes[-1].at  # what was tried is taken back
    return found


def test_through_a_cache_as_in_plain_forwards():
    model = tiny_llama()
    examples = crowd(0, 12)
    whole = plainly(model, examples)
    assert through(model, KeepAll(), examples) == whole
    assert 0 < sum(right for right, _ in whole) < len(whole)
    with attach(model, pattern=SlidingWindow(8)):
        windowed = plainly(model, examples)
    assert through(model, Window(8), examples) == windowed
    assert windowed != whole  # else the two comparisons would be one


@pytest.mark.parametrize("policy", [SinkWindow(2, 10), HeavyHitter(6, 6, block=4)])
def test_the_batch_and_what_was_tried_change_nothing(policy):
    model = tiny_llama()
    examples = crowd(1, 6)
    alone = through(model, policy, examples, rows=1)
    assert through(model, policy, examples, rows=4) == alone
    # Without the other candidates, what follows is the same.
    lonely = [
        Example(e.ids, tuple(Probe(p.at, (p.answer,), 0, p.evidence) for p in e.probes))
        for e in examples
    ]
    assert [exact for _, exact in through(model, policy, lonely)] == [exact for _, exact in alone]


def test_exact_is_what_greedy_decoding_writes():
    """Answers taken from the model itself are exact; with another last token they aren't."""
    model = tiny_llama()
    draw = random.Random(2)
    examples = []
    for _ in range(3):
        ids = [draw.randrange(64) for _ in range(30)]
        with torch.inference_mode():
            written = model.generate(
                torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=0
            )[0, 30:].tolist()
        off = [*written[:-1], (written[-1] + 1) % 64]
        for answer, other in ((written, off), (off, written)):
            probe = Probe(30, (tuple(other), tuple(answer)), 1, ((0, 1),))
            examples.append(Example((*ids, *answer), (probe,)))
    assert [exact for _, exact in through(model, KeepAll(), examples)] == [True, False] * 3


def test_long_prompts_go_in_by_chunks():
    class Counted(CacheSession):
        widths: list[int] = []  # noqa: RUF012  of this test alone

    model = tiny_llama()
    draw = random.Random(3)
    ids = tuple(draw.randrange(64) for _ in range(600))
    probe = Probe(598, ((ids[598], ids[599]), (1, 2)), 0, ((0, 1),))
    widths = []
    with attach(model):
        cache = Cache(model, KeepAll(), rollback=1)
        session = CacheSession(model, cache)
        forward = model.forward
        model.forward = lambda **kwargs: (  # type: ignore[method-assign]
            widths.append(kwargs["input_ids"].shape[1]) or forward(**kwargs)
        )
        try:
            play(session, [Example(ids, (probe,))])
        finally:
            del model.forward
    assert widths == [256, 256, 86, 1, 1]


def test_broken_output_is_said():
    probe = Probe(2, ((1, 2), (3, 4)), 0, ((0, 1),))
    nan = Told(lambda history: torch.full((VOCABULARY,), torch.nan))
    with pytest.raises(ArithmeticError, match="not finite"):
        play(nan, [Example((1, 2, 1, 2), (probe,))])
