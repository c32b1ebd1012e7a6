"""Prompts: answers lie where they are said to and nowhere else, lengths hold, seeds differ."""

from collections import Counter
from dataclasses import replace

import pytest

from attnspan.evaluation.tasks import (
    TASKS,
    CommonWords,
    Copy,
    DoesNotFit,
    FrequentWords,
    Needle,
    Passkey,
    Probe,
    StreamEval,
    VariableTracking,
    Writer,
)
from attnspan.evaluation.tasks.haystack import NOISE, hide

CHOICES = {name: task for name, task in TASKS.items() if name != "nll"}
ABSENT = {"passkey", "needle", "multi-value"}
EXACT = {
    "passkey",
    "needle",
    "multi-key",
    "multi-value",
    "multi-query",
    "variable-tracking",
    "copy",
}


def places(ids, wanted):
    """Where a run of tokens begins."""
    return [i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted]


def faults(name, example, length):
    """What is wrong with an example of the task `name`, in words."""
    found = []
    ids = example.ids
    if len(ids) > length or (name in EXACT and len(ids) != length):
        found.append(f"{len(ids)} tokens")
    cue = Copy().cue
    last = 0
    for probe in example.probes:
        answer, at = probe.answer, probe.at
        if at < last:
            found.append("probes overlap")
        last = at + len(answer)
        if ids[at:last] != answer:
            found.append("the right answer doesn't stand at its place")
        spans = sorted(probe.evidence)
        if any(ids[start:stop] != answer or stop > at for start, stop in spans):
            found.append("the evidence isn't the answer")
        if name == "copy":
            # One token comes often; what tells its place are the tokens before it.
            run = ids[at - cue : at]
            seen = [start + cue for start in places(ids[: at - 1], run)]
        else:
            seen = places(ids[:at], answer)
        if seen != [start for start, _ in spans]:
            found.append(f"the answer stands at {seen}, not {spans}")
        if name != "copy":
            wrong = [c for i, c in enumerate(probe.candidates) if i != probe.right]
            present = [bool(places(ids[:at], candidate)) for candidate in wrong]
            if any(present) if name in ABSENT else not all(present):
                found.append("wrong answers are where they mustn't be, or not where they must")
    return found


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("length", [880, 1337])
def test_answers_lie_where_they_should(name, length, writer):
    examples = list(CHOICES[name].examples(writer, length, 3, seed=5))
    assert examples
    for example in examples:
        assert example.ids[0] == 256
        assert example.probes
        assert faults(name, example, length) == []


@pytest.mark.parametrize("name", CHOICES)
def test_seeds_and_numbers_differ_and_nothing_else(name, writer):
    def made(seed, count=2):
        return list(CHOICES[name].examples(writer, 880, count, seed=seed))

    first, again, other = made(1), made(1), made(2)
    assert first == again
    assert not {e.ids for e in first} & {e.ids for e in other}
    assert len({e.ids for e in first}) == len(first)
    # More prompts of a setting begin with the same ones.
    more = made(1, 3)
    assert {e.ids for e in first} < {e.ids for e in more}


def test_the_check_sees_faults(bytewise):
    """Mutations: an answer lost, one too many, evidence that is off, a prompt that is too long."""
    writer = Writer(bytewise, 256)
    example = next(Passkey(depths=(0.5,)).examples(writer, 800, 1, seed=0))
    assert faults("passkey", example, 800) == []
    probe = example.probes[0]
    start, stop = probe.evidence[0]

    def changed(ids=example.ids, **fields):
        return replace(example, ids=tuple(ids), probes=(replace(probe, **fields),))

    lost = [*example.ids]
    lost[start] += 1
    twice = [*example.ids]
    twice[200 : 200 + stop - start] = probe.answer
    moved = ((start + 1, stop + 1), probe.evidence[1])
    other = (probe.right + 1) % len(probe.candidates)
    for mutant, word in (
        (changed(lost), "evidence"),
        (changed(twice), "stands at"),
        (changed(evidence=moved), "evidence"),
        (changed(evidence=probe.evidence[:1]), "stands at"),
        (changed(right=other), "right answer"),
        (changed((*example.ids, 1)), "tokens"),
    ):
        assert any(word in fault for fault in faults("passkey", mutant, 800)), word


def test_depths_and_distances_are_what_they_say(bytewise):
    writer = Writer(bytewise, 256)
    shares = {}
    for example in Passkey().examples(writer, 1024, 1, seed=3):
        (probe,) = example.probes
        shares[dict(probe.setting)["depth"]] = probe.evidence[0][0] / 1024
    assert list(shares) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert list(shares.values()) == sorted(shares.values())
    found = set()
    for example in Copy().examples(writer, 1024, 1, seed=3):
        for probe in example.probes:
            assert probe.distance == dict(probe.setting)["distance"]
            found.add(probe.distance)
    assert found == {64, 128, 256, 512, 768}
    # Those that have no room are left out: 600 tokens hold 512 + 32 and BOS.
    fitting = {p.distance for e in Copy().examples(writer, 600, 1, seed=3) for p in e.probes}
    assert fitting == {64, 128, 256, 512}


def test_the_cue_of_a_copy_is_unique_whatever_is_drawn(bytewise):
    """Of four letters, most blocks repeat a run, and such blocks are drawn anew."""
    task = Copy(distances=(64,), block=16, alphabet=4)
    for example in task.examples(Writer(bytewise, 256), 300, 20, seed=0):
        assert faults("copy", example, 300) == []


def test_where_the_right_candidate_stands_tells_nothing(bytewise):
    """Whoever always takes the first, or the nearest, is at chance."""
    writer = Writer(bytewise, 256)
    for task, length in ((StreamEval((5,)), 800), (Needle("multi-key", 4, depths=None), 800)):
        probes = [
            (example, probe)
            for example in task.examples(writer, length, 150, seed=1)
            for probe in example.probes
        ]
        chance = probes[0][1].chance
        error = (chance * (1 - chance) / len(probes)) ** 0.5
        first = sum(probe.right == 0 for _, probe in probes) / len(probes)
        nearest = 0
        for example, probe in probes:
            ends = [max(places(example.ids[: probe.at], c)) for c in probe.candidates]
            nearest += ends.index(max(ends)) == probe.right
        assert abs(first - chance) < 4 * error
        assert abs(nearest / len(probes) - chance) < 4 * error


def test_the_hop_that_is_asked_for_stands_anywhere_among_its_rivals(bytewise):
    writer = Writer(bytewise, 256)
    latest, between = Counter(), 0
    for example in VariableTracking().examples(writer, 900, 200, seed=1):
        for probe in example.probes:
            first = [min(places(example.ids, c)) for c in probe.candidates]
            latest[probe.setting] += first.index(max(first)) == probe.right
            # A rival lies within the chain that is asked for.
            chain = [probe.evidence[0][0] for probe in example.probes]
            between += any(chain[0] < place < chain[-1] for place in first if place not in chain)
    assert len(latest) == 5
    assert between > 500
    for count in latest.values():
        assert abs(count / 200 - 0.25) < 4 * (0.25 * 0.75 / 200) ** 0.5


def test_frequencies_are_those_of_the_paper(bytewise):
    writer = Writer(bytewise, 256)
    example = next(CommonWords().examples(writer, 8192, 1, seed=0))
    assert {len(probe.evidence) for probe in example.probes} == {30}
    rare = {
        len(places(example.ids[: example.probes[0].at], candidate))
        for probe in example.probes
        for i, candidate in enumerate(probe.candidates)
        if i != probe.right
    }
    assert rare == {3}
    example = next(FrequentWords().examples(writer, 4096, 1, seed=0))
    often = [len(probe.evidence) for probe in example.probes]
    # Words / (k^2 zeta(2)), k = 2, 3, 4: 1/4, 1/9, 1/16.
    assert often[0] * 4 == pytest.approx(often[1] * 9, abs=9)
    assert often[0] * 4 == pytest.approx(often[2] * 16, abs=16)
    for probe in example.probes:
        for i, candidate in enumerate(probe.candidates):
            if i != probe.right:
                assert len(places(example.ids[: probe.at], candidate)) < often[-1]


@pytest.mark.parametrize("name", CHOICES)
def test_what_does_not_fit_is_said(name, bytewise):
    with pytest.raises(DoesNotFit, match="length is 60"):
        list(CHOICES[name].examples(Writer(bytewise, 256), 60, 1, seed=0))


def test_hay_is_exact_at_any_length(writer):
    least = None
    for length in range(60, 140):
        try:
            text = hide(writer, length, ["Read."], [(0.5, ["\nIt is", " 7", ".\n"])], ["\nIt is"])
        except DoesNotFit:
            assert least is None
            continue
        least = least or length
        assert len(text.ids) == length
        start, stop = text.needles[0][1]
        assert text.ids[start:stop] == writer.ids(" 7")
    assert least == 60
    with pytest.raises(DoesNotFit, match="without any noise"):
        hide(writer, 3, ["Read."], [], [])


def test_pieces_have_the_tokens_of_running_text(joining):
    """Each sentence of the noise, written by pieces, is the sentence tokenised at once."""
    writer = Writer(joining, None)
    whole = joining("Well," + "".join(NOISE), add_special_tokens=False)["input_ids"]
    pieces = [writer.ids("Well"), writer.ids(","), *map(writer.ids, NOISE)]
    assert [token for piece in pieces for token in piece] == whole


def test_bad_arguments():
    with pytest.raises(ValueError, match="queries is 2; fewer than the 2 keys"):
        Needle(keys=2, queries=2)
    with pytest.raises(ValueError, match="the same tokens"):
        Probe(5, ((1,), (1,)), 0, ((1, 2),))
    with pytest.raises(ValueError, match="the same tokens"):
        Probe(5, ((1,), ()), 0, ((1, 2),))
