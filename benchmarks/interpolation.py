"""The bundled model beyond its trained length: interpolated positions and bounded caches.

The same tokens are scored at every length, each input with BOS first and the last of them at its
end.
Writes benchmarks/results/interpolation.json and .png; --report draws the plot again, and the tables
of docs/interpolation.md.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from interpolation_report import draw, tables
from record import RESULTS, write
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from attnspan.evaluation.files import write_file
from attnspan.evaluation.loop import first_token
from attnspan.evaluation.score import token_nll
from attnspan.evaluation.shrink import Passage, read, streamed
from attnspan.evaluation.texts import english_heldout, python_heldout
from attnspan.models import attach
from attnspan.models.loading import load
from attnspan.models.stretch import KINDS, Stretch
from attnspan.policies import KeepAll, Policy, parse

DOCS = Path(__file__).parent.parent / "docs" / "interpolation.md"
TRAINED = 1024
LENGTHS = (512, 1024, 2048, 4096)
FIXED = 4.0
DYNAMIC = 2.0
POLICIES = (
    "window:512",
    "sinks:4+window:508",
    "heavy:224+window:225",
    "compressive:window=314,memory=128,rate=4",
)
# Past it every query has angles of its own, which turn all keys anew.
DYNAMIC_STREAM = 2048


@dataclass(frozen=True)
class Run:
    """Tokens to score at every length.

    Attributes:
        bos: goes first at every length.
        ids: of the text, up to the last scored token.
        scored: how many of them, the last ones, are scored.
    """

    bos: int
    ids: tuple[int, ...]
    scored: int

    def passage(self, length: int) -> Passage:
        """The input of `length` tokens, and after it the last token that is scored."""
        ids = (self.bos, *self.ids[-length:])
        return Passage("", ids, len(ids) - self.scored, bos=True)


def runs_of(ids: Sequence[int], bos: int, settings: Settings) -> list[Run]:
    """Runs spread evenly over a text; the first has the longest input before its last token."""
    first, last = max(settings.lengths), len(ids)
    count = settings.places
    stops = [first + i * (last - first) // max(1, count - 1) for i in range(count)]
    return [
        Run(bos, tuple(ids[stop - max(settings.lengths) : stop]), settings.scored) for stop in stops
    ]


def interpolated(kind: str | None, factor: float) -> Any:
    """The bundled model in float32 with its positions interpolated; None: as it is."""
    if kind in KINDS:
        return load("bundled", "cpu", stretch=Stretch(kind, factor))[0]
    model: Any = load("bundled", "cpu")[0]
    if kind == "dynamic":
        parameters = {**model.config.rope_parameters, "rope_type": "dynamic", "factor": factor}
        model.config.rope_parameters = parameters
        _forget(model)
    return model


def _forget(model: Any) -> None:
    """Makes the angles anew: transformers' dynamic ones keep to the longest input seen before."""
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)


@torch.inference_mode()
def fresh(model: Any, run: Run, length: int) -> list[float]:
    """The nll of a run's tokens after one forward of `length` tokens, in nats."""
    _forget(model)
    ids = run.passage(length).ids
    logits = model(
        input_ids=torch.tensor([ids[:-1]]), use_cache=False, logits_to_keep=run.scored
    ).logits[0]
    return token_nll(logits, torch.tensor(ids[-run.scored :]))


def stream(model: Any, run: Run, length: int, policy: Policy) -> list[float]:
    """The same through a cache."""
    with attach(model):
        return streamed(model, policy, [run.passage(length)])[0]


@dataclass(frozen=True)
class Setup:
    """What a run's tokens are scored with; a kind of None is plain RoPE, a policy of None a fresh
    forward."""

    kind: str | None
    factor: float
    policy: str | None
    length: int

    def measure(self, run: Run) -> list[float]:
        model = interpolated(self.kind, self.factor)
        if self.policy is None:
            return fresh(model, run, self.length)
        return stream(model, run, self.length, parse(self.policy))


@dataclass(frozen=True)
class Case:
    """A line of the plot; a factor of None is the length over the trained one."""

    kind: str | None
    factor: float | None = None
    policy: str | None = None

    def setup(self, length: int) -> Setup:
        factor = max(1.0, length / TRAINED) if self.factor is None else self.factor
        plain = factor == 1 or (self.kind == "dynamic" and length <= TRAINED)
        if self.kind is None or plain:
            return Setup(None, 1.0, self.policy, length)
        return Setup(self.kind, factor, self.policy, length)

    def taken(self, length: int) -> bool:
        return not (self.kind == "dynamic" and self.policy and length > DYNAMIC_STREAM)


CASES = (
    Case(None),
    *(Case(kind) for kind in KINDS),
    *(Case(kind, FIXED) for kind in KINDS),
    Case("dynamic", DYNAMIC),
    Case("dynamic", DYNAMIC, "keep-all"),
    *(Case(None, policy=policy) for policy in POLICIES),
)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        lengths: tokens of the inputs, BOS included; `TRAINED` is among them.
        places: how many runs of tokens are scored of each text.
        scored: tokens of a run.
        texts: of the held-out ones that the package has.
        cases: lines of the plot, the first of which is plain RoPE.
    """

    lengths: tuple[int, ...] = LENGTHS
    places: int = 6
    scored: int = 256
    texts: tuple[str, ...] = ("Python", "English")
    cases: tuple[Case, ...] = CASES


SHORT = Settings(
    (TRAINED, 1152),
    1,
    64,
    ("Python",),
    (
        Case(None),
        Case("yarn"),
        Case("ntk", FIXED),
        Case("dynamic", DYNAMIC),
        Case("dynamic", DYNAMIC, "keep-all"),
        Case(None, policy=POLICIES[1]),
    ),
)
TEXTS = {"Python": python_heldout, "English": english_heldout}


def measure(
    name: str,
    ids: Sequence[int],
    bos: int,
    settings: Settings,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """A row for each case and length on one text; what two cases have in common runs once."""
    runs = runs_of(ids, bos, settings)
    points = [(c, c.setup(n)) for c in settings.cases for n in settings.lengths if c.taken(n)]
    found: dict[Setup, list[list[float]]] = {}
    for setup in dict.fromkeys(setup for _, setup in points):
        found[setup] = [setup.measure(run) for run in runs]
        tell(f"{name}, {setup}: {math.exp(_mean([_mean(each) for each in found[setup]])):.3f}")
    base = [_mean(nlls) for nlls in found[CASES[0].setup(TRAINED)]]
    return [
        {
            "text": name,
            "rope": case.kind,
            "fixed": case.factor,
            "factor": setup.factor,
            "policy": case.policy,
            "length": setup.length,
            **_figures(found[setup], base),
        }
        for case, setup in points
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _figures(nlls: Sequence[Sequence[float]], base: Sequence[float]) -> dict[str, Any]:
    """Over the runs of a text, each of which counts once: its tokens go together."""
    means = [_mean(each) for each in nlls]
    gaps = [a - b for a, b in zip(means, base, strict=True)]
    return {
        "nll": _mean(means),
        "nll_standard_error": _error(means),
        "perplexity": math.exp(_mean(means)),
        "over_trained": math.exp(_mean(gaps)),
        "gap": _mean(gaps),
        "gap_standard_error": _error(gaps),
        "runs": means,
    }


def _error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    middle = _mean(values)
    variance = math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def streams_off(run: Run, length: int) -> dict[str, float]:
    """How far a stream that keeps everything is from a fresh forward, in nats, at the worst token.

    Both see the same tokens with the same angles; what remains is rounding.
    """
    worst = {}
    for kind in (None, *KINDS):
        model = interpolated(kind, FIXED)
        pairs = zip(stream(model, run, length, KeepAll()), fresh(model, run, length), strict=True)
        worst["plain" if kind is None else f"{kind}:{FIXED:g}"] = max(abs(a - b) for a, b in pairs)
    return worst


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a check: two lengths, one place")
    parser.add_argument("--report", action="store_true", help="from the figures that are there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the two files")
    given = parser.parse_args(arguments)
    path = given.out.resolve() / "interpolation.json"
    if not given.report:
        write(path, results(SHORT if given.short else Settings()))
    result = json.loads(path.read_text())
    write_file(path.with_suffix(".png"), draw(result))
    if given.report:
        write_file(DOCS, tables(result, DOCS.read_text()).encode())


def results(settings: Settings) -> dict[str, Any]:
    model, tokenizer = load("bundled", "cpu")
    bos = first_token(model, tokenizer)
    assert bos is not None
    rows, off = [], {}
    for name in settings.texts:
        data = TEXTS[name]().encode()
        ids = read(io.BytesIO(data), tokenizer, name, None, len(data))
        rows += measure(name, ids, bos, settings, lambda line: print(line, flush=True))
        run, length = runs_of(ids, bos, settings)[0], min(4 * TRAINED, max(settings.lengths))
        off[name] = streams_off(run, length)
    return {
        "model": "bundled",
        "trained_length": TRAINED,
        "lengths": settings.lengths,
        "places": settings.places,
        "scored": settings.scored,
        "rows": rows,
        "stream_less_fresh": off,
    }


if __name__ == "__main__":
    main()
