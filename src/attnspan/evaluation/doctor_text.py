"""The doctor's report as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnspan.evaluation.display import printable, size
from attnspan.evaluation.heads import COPY_SHARE, FIRST, LOCAL, SINK
from attnspan.evaluation.verdicts import loss, named

_SHADES = " .:-=+*#%@"


def text(result: Mapping[str, Any]) -> str:
    """Verdicts first, then what they rest on."""
    return "\n".join(_lines(result)) + "\n"


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    meta = result["meta"]
    model = meta["model"]
    trained = model["trained_length"]
    yield printable(
        f"{model['name']}: {model['type']}, {model['parameters']:,} parameters, {model['dtype']}, "
        f"trained length {'unknown' if trained is None else f'{trained:,}'}; {meta['device']}, "
        f"{meta['threads']} threads"
    )
    yield printable(
        f"on {meta['text']}: {' and '.join(f'{n:,}' for n in meta['scored'])} tokens scored after "
        f"the first {meta['length']:,}; {'no BOS' if meta['bos'] is None else 'BOS first'}"
    )
    yield ""
    for each in result["verdicts"]:
        yield printable(f"{each['name'] + ':':<9}{each['sentence']}.")
    yield f"{'config:':<9}{result['config']['sentence']}."
    yield ""
    yield from _suggestion(result)
    yield ""
    yield from _windows(result["windows"])
    yield ""
    yield from _layers(result)
    yield from _heads(result["heads"])
    yield ""
    yield from _reach(result["reach"])
    if result["skipped"]:
        yield ""
        yield from (f"left out: {each}" for each in result["skipped"])


def _suggestion(result: Mapping[str, Any]) -> Iterator[str]:
    found, tested = result["suggestion"], result["tested"]
    halves = (
        f"chosen on the first {_counts(result['meta']['chosen_on'])} scored tokens, and the loss "
        "is that on the rest, which no choice saw"
    )
    if found is None:
        yield (
            "No policy is suggested: none that was measured is shown to be within the tolerance"
            + (f", {halves}." if tested else ".")
        )
    else:
        losses = ", ".join(
            f"{loss(each['over_best'])} on {each['text']}" for each in found["texts"]
        )
        before = ", ".join(loss(each["first_half"]) for each in found["texts"])
        ours, all_of_it = (
            f"{size(found[name])} at {found['tokens']:,} tokens and {size(found[name + '_far'])} "
            f"at {found['tokens_far']:,}"
            for name in ("bytes", "keep_all_bytes")
        )
        dtype = result["meta"]["model"]["dtype"]
        yield f"Suggested, the fewest bytes of what held within the tolerance ({halves}):"
        yield f"  --policy '{found['policy']}'"
        yield printable(f"  {losses}; where it was chosen {before}")
        yield f"  it holds {ours}, keep-all {all_of_it}, in {dtype}"
    for each in tested or ():
        if each["holds"] is False:
            failed = ", ".join(map(loss, each["second_half"]))
            yield f"  not {each['policy']}: chosen as well, but on the rest {failed}"


def _counts(counts: Sequence[int]) -> str:
    """As people read them, said once where all are the same."""
    return " and ".join(f"{count:,}" for count in (counts if len(set(counts)) > 1 else counts[:1]))


def _windows(curve: Mapping[str, Any]) -> Iterator[str]:
    best = f"fresh forwards of {curve['length']:,} tokens"
    if curve["reference"] is not None:
        best = f"window:{curve['reference']}, which does better than {best}"
    yield (
        f"Perplexity of a stream as its cache shrinks, over the best ({best}), with about 95 % "
        "intervals:"
    )
    for i, best in enumerate(curve["best"]):
        yield (
            f"  {printable(best['text'])}: the best {best['perplexity']:.4g}, by frequencies alone "
            f"{best['frequencies']:.4g}"
        )
        yield f"  {'tokens':>8}  {'window alone':<36}{curve['sinks']} sinks + window"
        for row in curve["rows"]:
            cells = [
                "-"
                if row[key] is None
                else f"{row[key]['texts'][i]['perplexity']:.4g}, "
                f"{loss(row[key]['texts'][i]['over_best'])}"
                for key in ("window", "sinks")
            ]
            yield f"  {row['tokens']:>8,}  {cells[0]:<36}{cells[1]}"
    if curve["fewer_sinks"]:
        parts = [
            f"{row['sinks']}: {'; '.join(loss(each['over_best']) for each in row['texts'])}"
            for row in curve["fewer_sinks"]
        ]
        yield f"  sinks at {curve['fewer_sinks'][0]['tokens']:,} tokens  {',  '.join(parts)}"


def _layers(result: Mapping[str, Any]) -> Iterator[str]:
    found = result["layers"]
    if found is None:
        return
    names = ", ".join(printable(each["text"]) for each in result["windows"]["best"])
    yield f"Each under {found['small']} alone, the others under {found['large']} ({names}):"
    for group, pairs in zip(found["groups"], found["alone"], strict=True):
        yield f"  {named(group):<14}" + "".join(f"{loss(each):<28}" for each in pairs).rstrip()
    yield ""


def _heads(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Attention to token 0 by layer and head (mean {found['mean_token0']:.3f}, the first "
        f"{FIRST} tokens together {found['mean_first_tokens']:.3f}; {found['sink_share']:.0%} of "
        f"the heads above {SINK}):"
    )
    if max(map(len, found["token0"])) <= 16:
        for layer, row in enumerate(found["token0"]):
            yield f"  {layer:>3}  " + " ".join(f"{value:.2f}" for value in row)
    else:
        yield f"  a character a head, from 0 to 1: {_SHADES!r}"
        for layer, row in enumerate(found["token0"]):
            shades = "".join(_SHADES[min(9, int(10 * value))] for value in row)
            yield f"  {layer:>3}  |{shades}|"
    total = sum(map(len, found["token0"]))
    near = f"{LOCAL:.0%} of their other attention on the nearest {found['near_window']} tokens"
    yield f"  {len(found['sink_heads'])} of {total} are sink heads"
    yield f"  {len(found['local_heads'])} are local ({near}): {_listed(found['local_heads'])}"
    yield (
        f"  {len(found['retrieval_heads'])} are retrieval heads (the most attended key is the one "
        f"to copy for {COPY_SHARE} or more of a repeated block's tokens): "
        f"{_listed(found['retrieval_heads'])}"
    )
    if found["mean_learned_sink"]:
        yield f"  learned sink logits take {found['mean_learned_sink']:.3f} of the attention"


def _listed(heads: list[list[int]], most: int = 12) -> str:
    if not heads:
        return "none"
    names = ", ".join(f"{layer}.{head}" for layer, head in heads[:most])
    return names + (f" and {len(heads) - most} more" if len(heads) > most else "")


def _reach(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Reach over {found['sequences']} sequences of {found['length']:,} tokens, the first "
        f"{FIRST} tokens apart (in brackets the least and most of single places):"
    )
    for what in ("gradients", "changes"):
        each = found[what]
        parts = [
            f"{float(share):.0%} within {distance:,} ({each['spread'][share][0]:,} to "
            f"{each['spread'][share][1]:,})"
            for share, distance in each["within"].items()
        ]
        yield f"  {what + ':':<11}{', '.join(parts)}"
    yield f"  the first tokens have {found['gradients']['first_tokens']:.1%} of the gradients"
    if found["bound"] is not None:
        for what in ("gradients", "changes"):
            beyond, pairs = found[what]["beyond_bound"], found[what]["beyond_bound_pairs"]
            told = "not measured" if beyond is None else f"{beyond:g} in {pairs:,} pairs of tokens"
            yield f"  {what} beyond the bound of {found['bound']:,}: {told}"
