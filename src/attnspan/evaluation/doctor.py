"""How far a model sees, and what may be dropped of what it holds: everything measured on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from attnspan.evaluation import bands, choice, curve, heads, reach, verdicts
from attnspan.evaluation import report as reports
from attnspan.evaluation.case import Case, prepare
from attnspan.evaluation.loop import Progress
from attnspan.evaluation.verdicts import TOLERANCE
from attnspan.models.anatomy import text_config
from attnspan.planner.reach import bound

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIMIT = 8192
"""Tokens scored of each text, beyond those that fill the largest window: half for choosing."""

REACH_PLACES, REACH_REPLACED = 4, 16
"""Places for gradients, and tokens replaced, of each sequence: two a text, so fewer of each."""

EXPERTS_ROUNDING = 1e-9
"""Nats that a change may seem to make where it can't reach, in a mixture of experts; fp32 logits
that differ in their last bits diverge by about the square of these, 1e-13."""


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
        limit: tokens scored of each text, at most; policies are chosen on the first half of them,
            and tested on the second.
        length: the largest window tried, and the tokens of the sequences on which attention and
            reach are measured; None is the trained length, at most `case.LONGEST`. A short
            text makes it smaller by halves.
        config: the model's `config.json` as it was written; some families drop what they don't use.
        seed: of what is drawn at random.
        report: is told how far each part is.

    Returns:
        `meta`, `config`, `heads`, `reach`, `windows`, `layers`, `suggestion`, `tested` (the
        candidates that the second half of the scored tokens was asked about, in that order),
        `verdicts` and `skipped`: what was left out, and why.

    Raises:
        ValueError: the model can't be done exactly, or a text is too short; one sentence says why.
        ArithmeticError: the model gives figures that are not finite, or isn't causal.
    """
    case, skipped = prepare(model, tokenizer, texts, limit, length)

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
    found = curve.measure(case, tell)
    search, suggestion, tested = None, None, None
    if not found.whole["judged"]:
        skipped.append(
            "layers and a suggestion: the model predicts no better than the tokens' frequencies, "
            "so no loss can be told"
        )
    else:
        search = choice.search(case, found, tell, skipped)
        suggestion, tested = choice.suggestion(case, found, search)
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
            chosen_on=[passage.scored for passage in found.first.passages],
            tolerance=TOLERANCE,
            seed=seed,
        ),
        "config": found_bands.as_dict(),
        "heads": found_heads.as_dict(),
        "reach": found_reach.as_dict(),
        "windows": found.whole,
        "layers": None if search is None else search.as_dict(),
        "suggestion": suggestion,
        "tested": tested,
        "skipped": skipped,
    }
    result["verdicts"] = verdicts.verdicts(result)
    return result


def _reach(
    case: Case, seed: int, tell: Callable[[int, int], None], skipped: list[str]
) -> reach.Reach:
    farthest = bound(case.windows)
    length = case.length
    if farthest is not None:
        # Long enough to look beyond the bound, where the model and the text allow it.
        longest = min(len(passage.ids) for passage in case.passages)
        wanted = min(4 * length, longest, case.trained or longest)
        length = min(wanted, max(length, farthest + 1 + max(32, farthest // 4)))
        if length <= farthest + 1 + heads.FIRST:
            skipped.append(
                f"reach beyond the bound of {farthest:,} tokens: sequences of {length:,} were "
                "measured"
            )
    config = text_config(case.model)
    experts = any(
        getattr(config, name, None)
        for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )
    return reach.measure(
        case.model,
        case.pieces(length),
        bound=farthest,
        places=REACH_PLACES,
        replaced=REACH_REPLACED,
        strict=False,
        rounding=EXPERTS_ROUNDING if experts else 0.0,
        seed=seed,
        report=tell,
    )
