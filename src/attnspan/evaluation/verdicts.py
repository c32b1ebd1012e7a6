"""The doctor's verdicts: one sentence each, with the figures that it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnspan.evaluation.heads import SINK
from attnspan.evaluation.influence import SHARES

TOLERANCE = 0.02
"""Loss of perplexity that is allowed. Two per cent is about what int8 keys and values, or another
seed of the same training, may cost, and well below what separates two sizes of a family of models.
The interval's upper end must lie within it, not just the mean."""


def within(over_best: Mapping[str, float]) -> bool:
    """Whether a perplexity over the best is shown to be within the tolerance."""
    return over_best["high"] <= 1 + TOLERANCE


def counted(curve: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows that say something of the model, largest first.

    Where a window does better than all that was in sight of a fresh forward, larger ones don't.
    """
    rows = sorted(curve["rows"], key=lambda row: -row["tokens"])
    return [
        row
        for row in rows
        if curve["reference"] in (None, row["tokens"]) or row["tokens"] < curve["reference"]
    ]


def sinks_needed(curve: Mapping[str, Any]) -> bool:
    """Whether a window loses without sinks, on every text, at more than half of the sizes.

    Both hold as many tokens, and the interval's lower end must lie above the tolerance.
    """
    sizes = [row["window_over_sinks"] for row in counted(curve) if row["window_over_sinks"]]
    worse = [all(each["low"] > 1 + TOLERANCE for each in texts) for texts in sizes]
    return 2 * sum(worse) > len(worse)


def safe_from(curve: Mapping[str, Any], key: str) -> int | None:
    """The smallest size from which on all larger ones are within the tolerance.

    It is told from all scored tokens, and needs none that had no part in the choice: the order of
    the sizes is fixed before anything is measured, and the first that fails ends it. To name one
    that loses more than the tolerance, the largest of those that do must pass, so the chance of it
    is that of a single test, however many sizes there are (a fixed sequence of tests, see
    `choice`). Windows and sinks + window are two such sequences, each with its own chance.
    """
    found = None
    for row in counted(curve):
        if row[key] is None or not row[key]["within"]:
            break
        found = row["tokens"]
    return found


def verdicts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{"name", "verdict", "sentence"}` for window, sinks, layers and reach."""
    return [_window(result), _sinks(result), _layers(result), _reach(result)]


def _one(name: str, verdict: str, sentence: str) -> dict[str, Any]:
    return {"name": name, "verdict": verdict, "sentence": sentence}


def loss(figures: Mapping[str, float]) -> str:
    """A ratio as people read it.

    >>> loss({"ratio": 1.013, "low": 1.004, "high": 1.022})
    '+1.3 % (+0.4 to +2.2)'
    >>> loss({"ratio": 3.5, "low": 3.1, "high": 4.0})
    '3.5 times (3.1 to 4)'
    """
    if figures["ratio"] >= 1.5:
        return "{ratio:.3g} times ({low:.2g} to {high:.2g})".format(**_capped(figures))
    percent = {name: 100 * (value - 1) for name, value in _capped(figures).items()}
    return "{ratio:+.1f} % ({low:+.1f} to {high:+.1f})".format(**percent)


def _capped(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: min(figures[name], 1e6) for name in ("ratio", "low", "high")}


def _losses(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{loss(each['over_best'])} on {each['text']}" for each in row["texts"])


def _unjudged(result: Mapping[str, Any]) -> str:
    texts = result["windows"]["best"]
    worst = next(each for each in texts if not each["better_than_frequencies"])
    return (
        f"at best the model has perplexity {worst['perplexity']:.4g} on {worst['text']}, where "
        f"knowing how often each token comes gives {worst['frequencies']:.4g}"
    )


def _window(result: Mapping[str, Any]) -> dict[str, Any]:
    curve, rows = result["windows"], result["windows"]["rows"]
    sizes = [row["tokens"] for row in rows]
    if not curve["judged"]:
        return _one(
            "window", "unknown", f"whether a window is safe can't be told: {_unjudged(result)}"
        )
    alone, sunk = safe_from(curve, "window"), safe_from(curve, "sinks")
    by_size = {row["tokens"]: row for row in rows}
    best = f"the best, fresh forwards of {curve['length']:,} tokens"
    if curve["reference"] is not None:
        best = f"the best, W={curve['reference']:,}"
    demand = f"within {TOLERANCE:.0%} of {best}"
    below = [size for size in sizes if alone is not None and size < alone]
    if alone is not None:
        sentence = f"window-safe from W={alone:,}"
        if alone == curve["reference"]:
            sentence += ", with which the model does best"
        else:
            sentence += f": {demand}, {_losses(by_size[alone]['window'])}"
        if below:
            sentence += (
                f"; W={max(below):,} isn't shown to be: {_losses(by_size[max(below)]['window'])}"
            )
        else:
            sentence += ", the smallest that was measured"
        if curve["reference"] is not None:
            gains = ", ".join(
                f"{each['fresh'] / each['perplexity']:.3g} times on {each['text']}"
                for each in curve["best"]
            )
            sentence += (
                f"; larger ones lose: fresh forwards of {curve['length']:,} tokens have {gains} "
                "the perplexity of the best, as if the model was trained under a window that its "
                "config doesn't declare"
            )
        return _one("window", "safe", sentence)
    sentence = (
        f"not window-safe at any W measured ({sizes[0]:,} to {sizes[-1]:,}): W={sizes[0]:,} costs "
        f"{_losses(rows[0]['window'])}"
    )
    if sunk is not None:
        sentence += (
            f"; with {curve['sinks']} sinks it is safe from {sunk:,} tokens in all: "
            f"{_losses(by_size[sunk]['sinks'])}"
        )
    return _one("window", "unsafe" if sunk is None else "safe with sinks", sentence)


def _sinks(result: Mapping[str, Any]) -> dict[str, Any]:
    curve, heads = result["windows"], result["heads"]
    attention = (
        f"{heads['sink_share']:.0%} of the heads give token 0 more than {SINK} of their attention "
        f"(mean {heads['mean_token0']:.3f})"
        if heads["sink_share"]
        else f"no head gives token 0 more than {SINK} of its attention (the most is "
        f"{max(map(max, heads['token0'])):.3f})"
    )
    if heads["mean_learned_sink"]:
        attention += (
            f"; learned sink logits, which no key has, take {heads['mean_learned_sink']:.3f} of it"
        )
    some = bool(heads["sink_share"])
    if not curve["judged"]:
        kind = "sink heads" if some else "no sinks"
        return _one("sinks", kind, f"{kind}: {attention}; what keeping them is worth can't be told")
    rows = [row for row in counted(curve) if row["window_over_sinks"]]
    if not rows:
        return _one("sinks", "sink heads" if some else "no sinks", attention)
    middle = rows[len(rows) // 2]
    pairs = zip(middle["window_over_sinks"], middle["window"]["texts"], strict=True)
    gap = ", ".join(f"{loss(figures)} on {text['text']}" for figures, text in pairs)
    beside = (
        f"the perplexity of a window alone over that of {curve['sinks']} sinks + window, both of "
        f"{middle['tokens']:,} tokens, is {gap}"
    )
    if sinks_needed(curve):
        sentence = f"needs sinks: {attention}, and {beside}"
        enough = _enough(curve)
        if enough is not None:
            sentence += f"; {enough} of them {'is' if enough == 1 else 'are'} enough"
        return _one("sinks", "needed", sentence)
    if some:
        return _one(
            "sinks",
            "not needed",
            f"has sink heads but doesn't need them kept: {attention}, and {beside}",
        )
    return _one("sinks", "no sinks", f"no sinks: {attention}, and {beside}")


def _enough(curve: Mapping[str, Any]) -> int | None:
    """The fewest sinks shown to be within the tolerance of all of them, and any more as well."""
    found = None
    for row in sorted(curve["fewer_sinks"], key=lambda row: -row["sinks"]):
        if not all(within(each) for each in row["over_all_sinks"]):
            break
        found = row["sinks"]
    return found


def _layers(result: Mapping[str, Any]) -> dict[str, Any]:
    found, curve = result["layers"], result["windows"]
    if not curve["judged"]:
        return _one(
            "layers", "unknown", f"which layers need to see all can't be told: {_unjudged(result)}"
        )
    if found is None:
        key = "sinks" if sinks_needed(curve) else "window"
        smallest = safe_from(curve, key)
        if smallest is not None and smallest < (curve["reference"] or curve["rows"][0]["tokens"]):
            row = next(row for row in curve["rows"] if row["tokens"] == smallest)
            return _one(
                "layers",
                "none",
                f"needs no layer full: all do with {row[key]['policy']}, {_losses(row[key])}",
            )
        return _one(
            "layers",
            "unknown",
            "which layers need to see all was not measured: "
            + "; ".join(each for each in result["skipped"] if each.startswith("layers")),
        )
    full, wanted = found["full_layers"], found["chosen"]
    if full is None and wanted is not None:
        return _one(
            "layers",
            "unknown",
            f"no layer is shown to do without seeing all: {found['large']} in all of them is "
            "within the tolerance on the first half of the scored tokens, but not on the second",
        )
    if full is None:
        return _one(
            "layers",
            "unknown",
            f"no layer can be told apart: with {found['large']} in all "
            "of them the loss is not within the tolerance already",
        )
    chosen = next(
        each
        for each in found["tried"]
        if sorted(
            layer
            for i, group in enumerate(found["groups"])
            if i not in each["small_groups"]
            for layer in group
        )
        == full
    )
    texts = [each["text"] for each in curve["best"]]
    total = sum(map(len, found["groups"]))
    cost = ", ".join(
        f"{loss(figures)} on {text}"
        for figures, text in zip(chosen["second_half"], texts, strict=True)
    )
    unseen = "on tokens that the choice didn't see"
    if wanted is not None and full != wanted:
        enough = f"{named(wanted)} alone {'was' if len(wanted) == 1 else 'were'} enough"
        unseen += f"; on those that it saw {enough if wanted else 'none was needed'}"
    if not full:
        return _one(
            "layers",
            "none",
            f"needs no layer full: all do with {found['small']}, {cost}, {unseen}",
        )
    if len(full) == total and full != wanted:
        return _one(
            "layers",
            "all",
            f"needs all {total} layers full ({found['large']}), as far as can be told {unseen}",
        )
    if len(full) == total:
        cheapest = min(max(each["ratio"] for each in pairs) for pairs in found["alone"])
        return _one(
            "layers",
            "all",
            f"needs all {total} layers full ({found['large']}): even the one that costs least "
            f"alone under {found['small']}, {100 * (cheapest - 1):+.1f} %, isn't shown to be "
            f"within {TOLERANCE:.0%}",
        )
    dear = [
        (group, max(each["ratio"] for each in pairs))
        for group, pairs in zip(found["groups"], found["alone"], strict=True)
        if set(group) <= set(full)
    ]
    alone = ", ".join(
        f"{named(group)} costs up to {100 * (ratio - 1):+.1f} %"
        for group, ratio in sorted(dear, key=lambda each: -each[1])
    )
    return _one(
        "layers",
        "some",
        f"needs {named(full)} full ({found['large']}), {len(full)} of {total}: alone under "
        f"{found['small']} {alone}; with the others under it {cost}, {unseen}",
    )


def named(layers: Sequence[int]) -> str:
    """Layers as people read them.

    >>> named([7]), named([1, 2, 3, 7, 9])
    ('layer 7', 'layers 1-3, 7, 9')
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(parts)}"


def _reach(result: Mapping[str, Any]) -> dict[str, Any]:
    found = result["reach"]
    if found["defects"]:
        return _one("reach", "defect", "; ".join(found["defects"]))
    bound = found["bound"]
    names = [f"{share:g}" for share in SHARES]
    parts = []
    for what, how in (("changes", "of what a changed token does"), ("gradients", "of gradients")):
        within_ = [f"{found[what]['within'][name]:,}" for name in names]
        parts.append(f"{' / '.join(within_)} tokens hold 50 / 90 / 99 % {how}")
    sentence = "effective reach: " + ", ".join(parts)
    if bound is None:
        sentence += f"; no bound, some layer sees all of the past ({found['length']:,} tried)"
    elif found["changes"]["beyond_bound"] is None:
        sentence += f"; nothing beyond the bound of {bound:,} was tried"
    elif found["changes"]["beyond_bound"]:
        sentence += f"; beyond the bound of {bound:,} nothing but rounding (experts)"
    else:
        sentence += f"; exactly zero beyond the bound of {bound:,}"
    return _one("reach", "measured", sentence)
