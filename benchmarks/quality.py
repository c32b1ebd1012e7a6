"""Perplexity and memory of the policies, on held-out Python and on held-out English.

Writes benchmarks/results/quality-{python,english}.json and .png.
"""

from __future__ import annotations

import argparse
import io
import json

from record import RESULTS, device

from attnspan.cache import parse_storage
from attnspan.evaluation.compare import compare
from attnspan.evaluation.display import show
from attnspan.evaluation.files import write_file
from attnspan.evaluation.plot import plot
from attnspan.evaluation.texts import english_heldout, python_heldout
from attnspan.models.loading import load
from attnspan.policies import parse

ROWS = (
    ("keep-all", "dense"),
    ("window:512", "dense"),
    ("sinks:4+window:508", "dense"),
    ("sinks:4+window:508", "int8"),
    ("sinks:4+window:508", "int4"),
    ("heavy:224+window:225", "dense"),
    ("compressive:window=314,memory=128,rate=4", "dense"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=60_000, help="tokens scored of each text")
    limit = parser.parse_args().limit
    model, tokenizer = load("bundled")
    for name, text in (("python", python_heldout()), ("english", english_heldout())):
        result = compare(
            model,
            tokenizer,
            io.BytesIO(text.encode()),
            [(parse(policy), parse_storage(storage)) for policy, storage in ROWS],
            model_name="bundled",
            name=f"held-out {name.capitalize()}",
            limit=limit,
            chunk=1024,
        )
        result["meta"]["device"] = device()
        print(f"held-out {name}")
        with io.StringIO() as table:
            show(result, table)
            print(table.getvalue(), flush=True)
        write_file(RESULTS / f"quality-{name}.json", (json.dumps(result, indent=1) + "\n").encode())
        write_file(RESULTS / f"quality-{name}.png", plot(result))


if __name__ == "__main__":
    main()
