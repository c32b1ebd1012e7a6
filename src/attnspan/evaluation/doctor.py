"""How far a model sees, and what may be dropped of what it holds: everything measured on it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from attnspan.evaluation import bands, heads, layers, reach, verdicts
from attnspan.evaluation import report as reports
from attnspan.evaluation.loop import Progress, first_token, trained_length
from attnspan.evaluation.shrink import (
    Ledger,
    Passage,
    best_steps,
    frequency_nll,
    perplexity,
    read,
    steps,
)
from attnspan.evaluation.verdicts import TOLERANCE, within
from attnspan.models.anatomy import Anatomy, anatomy_of, text_config
from attnspan.models.budget import resolve
from attnspan.policies import KeepAll, PerLayer, Policy, SinkWindow, Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIMIT = 4096
"""Tokens scored of each text, beyond those that fill the largest window."""

LONGEST = {"cpu": 1024, "cuda": 4096}
"""The largest window tried by default, and the tokens of a reach: a machine does it in minutes."""

LEAST_LENGTH = 64
LEAST_SCORED = 128

SINKS = 4
"""Tokens kept at the start, as in StreamingLLM (https://arxiv.org/abs/2309.17453)."""

FEWER_SINKS = (1, 2)
HALVINGS = 4
LEAST_WINDOW = 8

REACH_PLACES, REACH_REPLACED = 4, 16
"""Places for gradients, and tokens replaced, of each sequence: two a text, so fewer of each."""

FAR = 1 << 20
"""Tokens at which the bytes of a policy are given besides the trained length: 1M."""

EXPERTS_ROUNDING = 1e-9
"""Nats that a change may seem to make where it can't reach, in a mixture of experts; fp32 logits
that differ in their last bits diverge by about the square of these, 1e-13."""


@dataclass(frozen=True)
class _Case:
    """A model and the passages that it is examined on."""

    model: PreTrainedModel
    anatomy: Anatomy
    passages: tuple[Passage, ...]
    bos: int | None
    length: int
    trained: int | None

    @property
    def windows(self) -> list[int | None]:
        return [layer.sliding_window for layer in self.anatomy.layers]

    @property
    def full(self) -> int:
        """Tokens at which bytes are given: the trained length, where the config says it."""
        return self.trained or self.length

    def pieces(self, length: int) -> Tensor:
        """The start and the end of each passage, BOS first where there is one."""
        rows = []
        for passage in self.passages:
            ids = passage.ids
            rows.append(ids[:length])
            if len(ids) >= 2 * length:
                start = (self.bos,) if self.bos is not None else ()
                rows.append((*start, *ids[len(ids) - length + len(start) :]))
        return torch.tensor(rows, device=self.model.device)


def examine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, BinaryIO]] | None = None,
    *,
    model_name: str = "model",
    limit: int = LIMIT,
    length: int | None = None,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Everything that `attnspan doctor` reports, as JSON.

    Args:
        model: in eval mode, not attached.
        tokenizer: of that model.
        texts: names and binary UTF-8 files; None is the Python and the English that come with
            attnspan, which its bundled model never saw.
        model_name: what the report calls the model.
        limit: tokens scored of each text, at most.
        length: the largest window tried, and the tokens of the sequences on which attention and
            reach are measured; None is the trained length, at most `LONGEST`. A short text makes it
            smaller by halves.
        config: the model's `config.json` as it was written; some families drop what they don't use.
        seed: of what is drawn at random.
        report: is told how far each part is.

    Returns:
        `meta`, `config`, `heads`, `reach`, `windows`, `layers`, `suggestion`, `verdicts` and
        `skipped`: what was left out, and why.

    Raises:
        ValueError: the model can't be done exactly, or a text is too short; one sentence says why.
        ArithmeticError: the model gives figures that are not finite, or isn't causal.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < LEAST_SCORED:
        raise ValueError(
            f"limit is {limit!r}; a whole number of at least {LEAST_SCORED} is allowed"
        )
    case, skipped = _prepare(model, tokenizer, texts, limit, length)

    def tell(task: str, done: int, total: int) -> None:
        if report is not None:
            report(Progress(task, done, total))

    windows = case.windows
    pieces = case.pieces(case.length)
    tell("attention", 0, 1)
    found_bands = bands.examine(model, pieces[0], windows, config)
    found_heads = heads.measure(model, list(pieces), bos=case.bos, seed=seed)
    tell("attention", 1, 1)
    found_reach = _reach(case, seed, lambda done, total: tell("reach", done, total), skipped)
    curve, ledger = _curve(case, _sizes(case), tell)
    suggestion, search = None, None
    if not curve["judged"]:
        skipped.append(
            "layers and a suggestion: the model predicts no better than the tokens' frequencies, "
            "so no loss can be told"
        )
    else:
        search = _layers(case, curve, ledger, tell, skipped)
        suggestion = _suggestion(case, curve, search, ledger)
    result: dict[str, Any] = {
        "meta": reports.meta(
            "doctor",
            model,
            model_name,
            ", ".join(passage.name for passage in case.passages),
            limit=limit,
            length=case.length,
            bos=case.bos,
            scored=[passage.scored for passage in case.passages],
            tolerance=TOLERANCE,
            seed=seed,
        ),
        "config": found_bands.as_dict(),
        "heads": found_heads.as_dict(),
        "reach": found_reach.as_dict(),
        "windows": curve,
        "layers": None if search is None else search.as_dict(),
        "suggestion": suggestion,
        "skipped": skipped,
    }
    result["verdicts"] = verdicts.verdicts(result)
    return result


def shipped_texts() -> list[tuple[str, BinaryIO]]:
    """The held-out texts that come with attnspan."""
    from attnspan.evaluation.texts import english_heldout, python_heldout

    return [
        ("held-out Python", io.BytesIO(python_heldout().encode())),
        ("held-out English", io.BytesIO(english_heldout().encode())),
    ]


def _prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, BinaryIO]] | None,
    limit: int,
    length: int | None,
) -> tuple[_Case, list[str]]:
    anatomy = anatomy_of(model)
    trained, bos = trained_length(model), first_token(model, tokenizer)
    usual = LONGEST["cpu" if model.device.type == "cpu" else "cuda"]
    most = length if length is not None else min(usual, trained or usual)
    if isinstance(most, bool) or not isinstance(most, int) or most < LEAST_LENGTH:
        raise ValueError(
            f"length is {most!r}; a whole number of at least {LEAST_LENGTH} is allowed, and models "
            "trained for as many tokens"
        )
    if trained is not None and most > trained:
        raise ValueError(
            f"length is {most:,}; the model was trained for {trained:,} tokens, and up to as many "
            "are allowed"
        )
    skipped = []
    if trained is not None and most < trained and length is None:
        skipped.append(
            f"windows above {most:,}: the model was trained for {trained:,} tokens (--length gives "
            "another limit)"
        )
    read_texts = [
        (name, read(file, tokenizer, name, bos, most + limit))
        for name, file in (shipped_texts() if texts is None else texts)
    ]
    name, shortest = min(((name, len(ids)) for name, ids in read_texts), key=lambda each: each[1])
    if shortest < LEAST_LENGTH + LEAST_SCORED:
        raise ValueError(
            f"text {name}: it has {shortest:,} tokens; {LEAST_LENGTH + LEAST_SCORED} or more are "
            "needed"
        )
    kept = most
    # As many scored tokens as the largest window has, or all that are asked for.
    while kept // 2 >= LEAST_LENGTH and shortest - kept < min(limit, kept):
        kept //= 2
    if kept < most:
        skipped.append(
            f"windows above {kept:,}: text {name} has {shortest:,} tokens, too few for {most:,}"
        )
    passages = tuple(
        Passage(name, ids[: kept + limit], kept, bos is not None) for name, ids in read_texts
    )
    return _Case(model, anatomy, passages, bos, kept, trained), skipped


def _reach(
    case: _Case, seed: int, tell: Callable[[int, int], None], skipped: list[str]
) -> reach.Reach:
    bound = reach.bound(case.windows)
    length = case.length
    if bound is not None:
        # Long enough to look beyond the bound, where the model and the text allow it.
        longest = min(len(passage.ids) for passage in case.passages)
        wanted = min(4 * length, longest, case.trained or longest)
        length = min(wanted, max(length, bound + 1 + max(32, bound // 4)))
        if length <= bound + 1 + heads.FIRST:
            skipped.append(
                f"reach beyond the bound of {bound:,} tokens: sequences of {length:,} were measured"
            )
    config = text_config(case.model)
    experts = any(
        getattr(config, name, None)
        for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )
    return reach.measure(
        case.model,
        case.pieces(length),
        bound=bound,
        places=REACH_PLACES,
        replaced=REACH_REPLACED,
        strict=False,
        rounding=EXPERTS_ROUNDING if experts else 0.0,
        seed=seed,
        report=tell,
    )


def _sizes(case: _Case) -> list[int]:
    """Window sizes from the largest down by halves."""
    own = [window for window in case.windows if window is not None]
    top = case.length
    if len(own) == len(case.windows):
        # No layer may look further than it was trained to.
        top = min(top, min(own))
    return [top >> i for i in range(HALVINGS + 1) if top >> i >= min(LEAST_WINDOW, top)]


def _sunk(size: int, sinks: int = SINKS) -> Policy:
    return SinkWindow(sinks, size - sinks)


def _curve(
    case: _Case, sizes: Sequence[int], tell: Callable[[str, int, int], None]
) -> tuple[dict[str, Any], Ledger]:
    pairs = [(size, Window(size), _sunk(size) if size > SINKS else None) for size in sizes]
    runs = sum(1 + (sunk is not None) for _, _, sunk in pairs) + len(FEWER_SINKS)
    total = best_steps(case.passages) + runs * steps(case.passages)
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        tell("windows", done, total)

    ledger = Ledger(case.model, case.passages, told)
    fresh = ledger.best
    for _, window, sunk in pairs:
        for policy in (window, sunk):
            if policy is not None:
                ledger.nlls(policy)
    reference = _reference(ledger, [window for _, window, _ in pairs])
    if reference is not None:
        ledger.best = ledger.nlls(reference[1])
    vocabulary = text_config(case.model).vocab_size
    texts = []
    for passage, whole, nlls, frequency in zip(
        case.passages, fresh, ledger.best, frequency_nll(case.passages), strict=True
    ):
        blind = min(math.log(vocabulary), frequency)
        texts.append(
            {
                "text": passage.name,
                "perplexity": perplexity(nlls),
                "fresh": perplexity(whole),
                "frequencies": math.exp(blind),
                "better_than_frequencies": math.fsum(nlls) / len(nlls) < blind,
            }
        )
    rows = []
    for size, window, sunk in pairs:
        row: dict[str, Any] = {"tokens": size, "window": _row(case, ledger, window)}
        row["sinks"] = None if sunk is None else _row(case, ledger, sunk)
        row["window_over_sinks"] = (
            None if sunk is None else [each.as_dict() for each in ledger.against(window, sunk)]
        )
        rows.append(row)
    curve: dict[str, Any] = {
        "length": case.length,
        "reference": None if reference is None else reference[0],
        "best": texts,
        "judged": all(each["better_than_frequencies"] for each in texts),
        "sinks": SINKS,
        "rows": rows,
        "fewer_sinks": [],
    }
    if verdicts.sinks_needed(curve):
        size = sizes[len(sizes) // 2]
        for sinks in (*FEWER_SINKS, SINKS):
            if sinks < size:
                row = _row(case, ledger, _sunk(size, sinks))
                curve["fewer_sinks"].append({"sinks": sinks, "tokens": size, **row})
    tell("windows", total, total)
    return curve, ledger


def _reference(ledger: Ledger, windows: Sequence[Window]) -> tuple[int, Window] | None:
    """The window that predicts better than fresh forwards of all that may be seen, if one does.

    So it is of a model that was trained under a window which its config doesn't declare: what it
    gives with more in sight is not the best that it can do.
    """
    better = [
        window
        for window in windows
        if all(pair.high < 1 - TOLERANCE for pair in ledger.against_best(window))
    ]
    if not better:
        return None
    chosen = min(better, key=lambda each: sum(map(math.fsum, ledger.nlls(each))))
    return chosen.window, chosen


def _row(case: _Case, ledger: Ledger, policy: Policy | PerLayer) -> dict[str, Any]:
    row = ledger.row(policy)
    row["within"] = all(within(each["over_best"]) for each in row["texts"])
    row["bytes"] = policy_bytes(case.anatomy, policy, ledger.model.dtype, case.full)
    row["bytes_far"] = policy_bytes(case.anatomy, policy, ledger.model.dtype, FAR)
    return row


def policy_bytes(
    anatomy: Anatomy, policy: Policy | PerLayer, dtype: torch.dtype, tokens: int
) -> int:
    """Bytes of the keys and values that one sequence holds after `tokens`, dense, and no more."""
    total = 0
    for layer, each in zip(anatomy.layers, resolve(policy, anatomy.layers), strict=True):
        held = tokens if each.capacity is None else min(tokens, each.capacity)
        total += 2 * held * layer.spec.num_kv_heads * layer.spec.head_dim * dtype.itemsize
    return total


def _layers(
    case: _Case,
    curve: dict[str, Any],
    ledger: Ledger,
    tell: Callable[[str, int, int], None],
    skipped: list[str],
) -> layers.Search | None:
    sizes = [row["tokens"] for row in verdicts.counted(curve)]
    small = sizes[min(3, len(sizes) - 1)]
    large = sizes[0]
    sunk = verdicts.sinks_needed(curve)
    key = "sinks" if sunk else "window"
    rows = {row["tokens"]: row[key] for row in curve["rows"]}
    if small == large or rows[small] is None:
        skipped.append(f"layers: a window of {large:,} leaves no smaller one to try")
        return None
    if rows[small]["within"]:
        skipped.append(f"layers one by one: all of them do with {rows[small]['policy']}")
        return None
    if not rows[large]["within"]:
        skipped.append(
            f"layers one by one: {rows[large]['policy']} in all of them is not within "
            f"{TOLERANCE:.0%} of the best already"
        )
        return None
    policies = [_sunk(size) if sunk else Window(size) for size in (large, small)]
    count = sum(window is None for window in case.windows) or len(case.windows)
    groups = min(count, layers.MOST_GROUPS)
    total = (groups + math.ceil(math.log2(groups + 1)) + 1) * steps(case.passages)
    done = 0

    def told(step: int) -> None:
        nonlocal done
        done += step
        tell("layers", min(done, total), total)

    ledger.told = told
    found = layers.search(ledger, case.windows, policies[0], policies[1], 1 + TOLERANCE)
    tell("layers", total, total)
    if groups < count:
        skipped.append(f"single layers: {count} were tried in {groups} groups of neighbours")
    return found


def _suggestion(
    case: _Case, curve: dict[str, Any], search: layers.Search | None, ledger: Ledger
) -> dict[str, Any] | None:
    """The policy with the fewest bytes among those that were measured within the demand."""
    rows = [row[key] for row in curve["rows"] for key in ("window", "sinks") if row[key]]
    rows += curve["fewer_sinks"]
    if search is not None and search.chosen:
        count = len(case.windows)
        policy = layers.assigned(count, search.groups, search.chosen, search.large, search.small)
        rows.append(_row(case, ledger, policy))
    good = [row for row in rows if row["within"]]
    if not good:
        return None
    # Of equal bytes the one that loses less.
    chosen = min(good, key=lambda row: (row["bytes_far"], row["texts"][0]["over_best"]["ratio"]))
    dtype = ledger.model.dtype
    return {
        "policy": chosen["policy"],
        "texts": chosen["texts"],
        "bytes": chosen["bytes"],
        "bytes_far": chosen["bytes_far"],
        "keep_all_bytes": policy_bytes(case.anatomy, KeepAll(), dtype, case.full),
        "keep_all_bytes_far": policy_bytes(case.anatomy, KeepAll(), dtype, FAR),
        "tokens": case.full,
        "tokens_far": FAR,
    }
