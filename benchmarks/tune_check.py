"""What `attnspan tune` chose for the bundled model, on texts that it didn't see at all.

    python benchmarks/tune_check.py

Reads `results/tune_bundled.json`, writes `results/tune_check.json`. The passages are streamed one
after the other by `attnspan.evaluation.loop`, as `attnspan stream` does, by none of tune's code.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from attnspan.cache import Dense, Storage, parse_storage
from attnspan.evaluation import report as reports
from attnspan.evaluation.files import to_json, write_file
from attnspan.evaluation.intervals import by_passage, ratio
from attnspan.evaluation.loop import Stream, run
from attnspan.evaluation.shrink import PassageSource
from attnspan.evaluation.texts import english_heldout, python_heldout
from attnspan.models import Cache, attach
from attnspan.models.loading import load
from attnspan.policies import KeepAll, PerLayer, Policy, parse

RESULTS = Path(__file__).parent / "results"
PASSAGES = 64


def unseen(text: bytes, length: int, used: int, count: int) -> list[list[int]]:
    """Passages that lie between those that tune used: it cuts a text into pieces and takes some.

    Args:
        used: passages of each half of the text that tune may have taken; 0: it had another text.
    """
    body = length - 1
    pieces = [text[i : i + body] for i in range(0, len(text) - body + 1, body)]
    half = len(pieces) // 2
    late = len(pieces) - half
    taken = {half * i // used for i in range(used)}
    taken |= {late + place for place in taken}
    left = [piece for i, piece in enumerate(pieces) if i not in taken]
    chosen = [left[len(left) * i // count] for i in range(count)]
    return [[256, *piece] for piece in chosen]  # the bundled model's tokens are bytes


def nlls(
    model, policy: Policy | PerLayer, storage: Storage, passages: list[list[int]]
) -> tuple[list[float], int]:
    """The mean nll of each passage's second half, and the bytes that were held."""
    cache, found, held = Cache(model, policy, storage), [], 0
    for ids in passages:
        source = PassageSource(ids)
        stream = Stream(model, cache, source, first=None, watch=range(len(ids) // 2, len(ids)))
        run(stream)
        found.append(math.fsum(stream.watched) / len(stream.watched))
        held = max(held, cache.peak_bytes)
        cache.reset()
    return found, held


def main() -> None:
    tuned = json.loads((RESULTS / "tune_bundled.json").read_text())
    chosen, length = tuned["chosen"], tuned["meta"]["length"]
    used = tuned["meta"]["passages"][0]
    model, _ = load("bundled", dtype=torch.bfloat16)
    texts = {
        "Python, passages that tune left out": (python_heldout().encode(), used),
        "English": (english_heldout().encode(), 0),
    }
    rows = []
    with attach(model):
        for name, (text, taken) in texts.items():
            passages = unseen(text, length, taken, PASSAGES)
            full, _ = nlls(model, KeepAll(), Dense(), passages)
            policy, storage = parse(chosen["policy"]), parse_storage(chosen["storage"])
            own, held = nlls(model, policy, storage, passages)
            rows.append(
                {
                    "text": name,
                    "passages": len(passages),
                    "nll_full": math.fsum(full) / len(full),
                    "bytes": held,
                    "times_fewer": tuned["full"]["bytes"] / held,
                    "perplexity": by_passage(
                        [a - b for a, b in zip(own, full, strict=True)]
                    ).as_dict(),
                    "nll": ratio(own, full).as_dict(),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    meta = reports.meta("tune_check", model, "bundled", ", ".join(texts), length=length)
    kept = {"policy": chosen["policy"], "storage": chosen["storage"]}
    write_file(RESULTS / "tune_check.json", to_json({"meta": meta, **kept, "rows": rows}).encode())


if __name__ == "__main__":
    main()
