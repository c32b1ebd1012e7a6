"""The page's JavaScript against the planner, over random cases, to the last digit.

What runs is the script that ships, in node, where there is no document: it then only gives its
functions. Whole numbers come with all their digits, doubles as the shortest text that reads back.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import attnspan.explorer
from attnspan.explorer.page import page
from attnspan.patterns import pairs, parse
from attnspan.planner.fit import cheapest, longest
from attnspan.planner.forms import LAYOUTS, work
from attnspan.planner.links import DEVICES, LINKS, Machine
from attnspan.planner.plan import plan
from attnspan.planner.presets import MODELS, model
from attnspan.planner.quantities import shown
from attnspan.planner.ring import Heads, cost
from attnspan.planner.weight_bytes import distinct
from attnspan.policies import parse as parse_policy
from attnspan.ring.layout import Contiguous, Striped, ZigZag

NODE = shutil.which("node")
APP = Path(attnspan.explorer.__file__).parent / "static" / "app.js"
pytestmark = pytest.mark.skipif(NODE is None, reason="node isn't installed")

# Runs each call of a list of [name, arguments], on the page's own data.
_HARNESS = """
const vm = require("node:vm");
const fs = require("node:fs");
const world = vm.createContext({ console, URLSearchParams });
vm.runInContext(fs.readFileSync(process.argv[1], "utf8"), world);
const twin = world.attnspan;
const given = JSON.parse(fs.readFileSync(0, "utf8"));
const find = (list, name) => list.find((each) => each.name === name);
const spec = (name) => {
  const open = name.endsWith("*");
  const found = find(given.page.presets, open ? name.slice(0, -1) : name);
  return open ? twin.unbounded(found) : found;
};
const asked = (how) => ({
  ...how,
  device: find(given.page.devices, how.device),
  link: how.link ? find(given.page.links, how.link) : null,
  policy: how.policy ? twin.parsePolicy(how.policy) : null,
});
const calls = {
  plan: (name, how) => twin.plan(spec(name), asked(how)),
  prefill: (name, how) => twin.prefill(spec(name), asked(how)),
  cache: (name, how) =>
    twin.cacheBytes(spec(name), how.context, asked(how).policy, how.storage, how.batch),
  longest: (name, how) => twin.longest(spec(name), asked(how)),
  cheapest: (name, how) => twin.cheapest(spec(name), asked(how)).map((each) => ({
    change: each.change, loses: each.loses, total: each.total, why: each.why,
  })),
  work: (text, n, size, layout) => {
    const found = twin.work(twin.parsePattern(text), n, size, layout);
    return {
      ...found,
      rounds: twin.rounds(found), at_once: twin.atOnce(found), imbalance: twin.imbalance(found),
      sent: twin.sent(found), received: twin.received(found),
    };
  },
  cost: (text, n, size, layout, heads, device, link, schedule) => twin.cost(
    schedule, twin.work(twin.parsePattern(text), n, size, layout), heads,
    { device: find(given.page.devices, device), link: find(given.page.links, link) },
  ),
  pattern: (text, n) => {
    const found = twin.parsePattern(text);
    const rows = [];
    for (let i = 0; i < n; i++) {
      let row = "";
      for (let j = 0; j < n; j++) row += twin.sees(found, i, j) ? "1" : "0";
      rows.push(row);
    }
    return { text: twin.patternText(found), rows, pairs: twin.pairs(found, n) };
  },
  chunks: (layout, n, size) =>
    Array.from({ length: size }, (_, rank) => twin.chunksOf(layout, n, size, rank)),
  policy: (text) => twin.policyText(twin.parsePolicy(text)),
  shown: (count) => twin.shown(count),
  distinct: (total, active, tokens) => twin.distinct(total, active, tokens),
};
const answers = given.calls.map(([name, args]) => {
  try {
    return { value: calls[name](...args) };
  } catch (error) {
    if (error instanceof TypeError || error instanceof RangeError) throw error;
    return { error: error.message };
  }
});
process.stdout.write(twin.toJson(answers));
"""


def run(calls: list[tuple[str, list[Any]]]) -> list[dict[str, Any]]:
    """For each call `{"value": ...}`, or `{"error": its sentence}`."""
    assert NODE is not None
    given = json.dumps({"page": page(), "calls": calls})
    done = subprocess.run(
        [NODE, "-e", _HARNESS, str(APP)], input=given, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def spec(name: str) -> Any:
    if not name.endswith("*"):
        return model(name)
    found = model(name[:-1])
    return replace(found, windows=(None,) * found.layers)


def policy(random: random.Random) -> str | None:
    def some(most: int = 20_000) -> int:
        return int(2 ** random.uniform(0, 14)) if random.random() < 0.7 else random.randint(1, most)

    match random.randrange(8):
        case 0 | 1:
            return None
        case 2:
            return f"window:{some()}"
        case 3:
            return f"sinks:{random.randint(0, 64)}+window:{some()}"
        case 4:
            block = random.choice(["", ",block=1", ",block=7"])
            return f"heavy:{some()}+window:{some()}{block}"
        case 5:
            return f"compressive:window={some()},memory={some(999)},rate={random.randint(1, 9)}"
        case 6:
            sizes = random.choice(["", ",observed=3,neighbours=0", ",observed=7,block=7"])
            return f"snap:{some()}+window:{some()}{sizes}"
    return f"window:{some()},block={random.randint(1, 99)}"


def asked(random: random.Random, ring: bool = False) -> dict[str, Any]:
    context = int(2 ** random.uniform(0, 23))
    if random.random() < 0.1:
        context = random.choice([1, 2, 4095, 4096, 4097, 2**31 - 1])
    devices = random.choice([1, 1, 1, 2, 3, 8, 16]) if ring else 1
    return {
        "context": context,
        "policy": policy(random),
        "storage": random.choice(["dense", "dense", "int8", "int4"]),
        "batch": random.choice([1, 1, 2, 7, 64, random.randint(1, 2000)]),
        "weights": random.choice(["bf16", "int8", "int4"]),
        "device": random.choice(list(DEVICES)),
        "devices": devices,
        "link": random.choice(list(LINKS)) if devices > 1 else None,
        "chunk": random.choice([None, None, 1, 100, 2048]) if devices == 1 else None,
        "memory": random.choice([None, None, random.randint(1, 10**13)]),
    }


def differences(found: Any, right: Any, where: str = "") -> list[str]:
    """Where two values of JSON differ; of two objects what the first has is compared."""
    if isinstance(found, dict) and isinstance(right, dict):
        return [d for key in found for d in differences(found[key], right[key], f"{where}.{key}")]
    if isinstance(found, list) and isinstance(right, list) and len(found) == len(right):
        both = zip(found, right, strict=True)
        return [d for k, (f, r) in enumerate(both) for d in differences(f, r, f"{where}[{k}]")]
    return [] if found == right else [f"{where}: {found!r} is not {right!r}"]


def compared(
    names: list[str], calls: list[tuple[str, list[Any]]], oracle: Any
) -> tuple[list[str], int]:
    """All that differs, and how many calls the two refused alike."""
    wrong, refused = [], 0
    for label, call, answer in zip(names, calls, run(calls), strict=True):
        try:
            right = {"value": oracle(*call[1])}
        except ValueError as error:
            right = {"error": str(error)}
        if "error" in right or "error" in answer:
            refused += 1
        alike = answer.keys() == right.keys()
        found = differences(answer, right) if alike else [f"{answer} is not {right}"]
        wrong += [f"{label} {each}" for each in found]
    return wrong, refused


def test_plans_of_random_models_contexts_and_policies_are_the_planners() -> None:
    seeded = random.Random(1)
    names = [seeded.choice(MODELS) + seeded.choice(["", "", "*"]) for _ in range(600)]
    calls = [("plan", [name, asked(seeded)]) for name in names]
    wrong, refused = compared(
        [f"{name} {call[1][1]}" for name, call in zip(names, calls, strict=True)],
        calls,
        lambda name, how: plan(spec(name), **how).as_dict(),
    )
    assert not wrong, "\n".join(wrong[:20])
    assert refused < 150


def test_plans_on_rings_are_the_planners() -> None:
    seeded = random.Random(2)
    calls = []
    for _ in range(250):
        how = asked(seeded, ring=True)
        calls.append(("plan", [seeded.choice(MODELS), how]))
    wrong, refused = compared(
        [str(call[1]) for call in calls],
        calls,
        lambda name, how: plan(spec(name), **how).as_dict(),
    )
    assert not wrong, "\n".join(wrong[:20])
    assert refused < 150


def test_every_preset_plans_alike_as_it_is_and_without_windows() -> None:
    calls = [
        ("plan", [name + star, {"context": context, "device": "h100", "policy": None}])
        for name in MODELS
        for star in ("", "*")
        for context in (1000, 131_072)
    ]
    wrong, refused = compared(
        [str(call[1]) for call in calls],
        calls,
        lambda name, how: plan(spec(name), **how).as_dict(),
    )
    assert not wrong, "\n".join(wrong[:20])
    assert not refused


def test_what_curves_are_drawn_from_is_the_plans_own() -> None:
    seeded = random.Random(3)
    calls: list[tuple[str, list[Any]]] = []
    for _ in range(150):
        name, how = seeded.choice(MODELS), asked(seeded)
        calls += [("prefill", [name, how]), ("cache", [name, how])]
    plans = [("plan", args) for _, args in calls]
    for (kind, args), answer, whole in zip(calls, run(calls), run(plans), strict=True):
        expected = whole
        if "value" in whole:
            value = whole["value"]
            expected = {"value": value["prefill"] if kind == "prefill" else value["cache"]["total"]}
        assert answer == expected, args


def test_what_fits_is_the_planners() -> None:
    seeded = random.Random(4)
    calls: list[tuple[str, list[Any]]] = []
    for _ in range(25):
        how = asked(seeded) | {"memory": seeded.randint(10**9, 10**12)}
        how = {**how, "policy": None} if seeded.random() < 0.7 else how
        name = seeded.choice(MODELS)
        calls.append(("cheapest", [name, how]))
        calls.append(("longest", [name, {k: v for k, v in how.items() if k != "context"}]))
    wrong, _ = compared(
        [str(call) for call in calls],
        calls,
        lambda name, how: (
            [
                {
                    "change": each.change,
                    "loses": each.loses,
                    "total": None if each.plan is None else each.plan.total,
                    "why": each.why,
                }
                for each in cheapest(spec(name), **how)
            ]
            if "context" in how
            else longest(spec(name), **how).context
        ),
    )
    assert not wrong, "\n".join(wrong[:20])


PATTERNS = (
    "Causal()",
    "Full()",
    "SlidingWindow({a})",
    "SlidingWindow({a}, include_self=False)",
    "SlidingWindow({a}, dilation={c})",
    "SlidingWindow({a}, right={b})",
    "SlidingWindow({a}) | Sinks({b})",
    "SlidingWindow({a}, include_self=False, dilation={c})",
    "Strided({a}, {c})",
    "Blockwise({a})",
    "Blockwise({a}, before=True)",
    "Blockwise({a}, causal=False)",
    "GlobalTokens({b})",
    "GlobalTokens({b}, causal=False) & Causal()",
    "Longformer({a}, {b})",
    "Longformer({a}, {b}, right={c})",
    "Documents(({a}, {b}, {c}))",
    "Documents(({a}, {c}), causal=False)",
    "Sinks({b}) | SlidingWindow({c}, right=2) & Causal()",
    "Strided({a}, {c}) | Sinks(1)",
    "~Causal()",
)


def test_the_work_of_rings_is_the_planners() -> None:
    seeded = random.Random(5)
    calls: list[tuple[str, list[Any]]] = []
    for _ in range(500):
        a, b, c = (int(2 ** seeded.uniform(0, 12)) for _ in range(3))
        text = seeded.choice(PATTERNS).format(a=a, b=b, c=seeded.choice([1, 2, 3, c]))
        n = int(2 ** seeded.uniform(0, 20))
        calls.append(("work", [text, n, seeded.randint(1, 16), seeded.choice(LAYOUTS)]))

    def oracle(text: str, n: int, size: int, layout: str) -> dict[str, Any]:
        found = work(parse(text), n, size, layout)
        return {
            "n": found.n,
            "size": found.size,
            "exact": found.exact,
            "pairs": found.pairs.tolist(),
            "needs": found.needs.tolist(),
            "imbalance": found.imbalance,
            "sent": found.sent.tolist(),
            "received": found.received.tolist(),
            "rounds": [each._asdict() for each in found.rounds],
            "at_once": [each._asdict() for each in found.at_once],
        }

    wrong, refused = compared([str(call[1]) for call in calls], calls, oracle)
    assert not wrong, "\n".join(wrong[:20])
    assert refused < 300


def test_the_cost_of_rings_is_the_planners() -> None:
    seeded = random.Random(6)
    calls: list[tuple[str, list[Any]]] = []
    for _ in range(200):
        a, b = (int(2 ** seeded.uniform(0, 14)) for _ in range(2))
        text = seeded.choice(PATTERNS[:7]).format(a=a, b=b, c=2)
        kv = seeded.choice([1, 2, 8])
        heads = {"query": kv * seeded.choice([1, 4]), "kv": kv, "dim": seeded.choice([64, 128])}
        layout = seeded.choice(LAYOUTS[:2])
        given = [text, int(2 ** seeded.uniform(4, 22)), seeded.randint(1, 16), layout, heads]
        rates = [seeded.choice(list(DEVICES)), seeded.choice(list(LINKS))]
        calls.append(("cost", [*given, *rates, seeded.choice(["ring", "allgather"])]))

    def oracle(
        text: str,
        n: int,
        size: int,
        layout: str,
        heads: dict[str, int],
        device: str,
        link: str,
        schedule: str,
    ) -> dict[str, Any]:
        machine = Machine(DEVICES[device], LINKS[link])
        found = cost(
            schedule, lambda some: work(parse(text), n, some, layout), size, Heads(**heads), machine
        )
        return vars(found)

    wrong, _ = compared([str(call[1]) for call in calls], calls, oracle)
    assert not wrong, "\n".join(wrong[:20])


def test_processes_hold_the_tokens_that_the_layouts_deal_out() -> None:
    layouts = {"contiguous": Contiguous(), "zigzag": ZigZag(), "striped": Striped()}
    calls: list[tuple[str, list[Any]]] = [
        ("chunks", [name, 2 * size * part, size])
        for name in layouts
        for size in (1, 2, 3, 16)
        for part in (1, 7)
    ]
    wrong, _ = compared(
        [str(call[1]) for call in calls],
        calls,
        lambda name, n, size: [
            [[each.start, each.length, each.step] for each in chunks]
            for chunks in layouts[name].chunks(n, size)
        ],
    )
    assert not wrong, "\n".join(wrong[:20])


def test_patterns_see_the_pairs_that_pythons_see_and_print_alike() -> None:
    seeded = random.Random(7)

    def leaf() -> str:
        a, b, c = (seeded.randint(1, 12) for _ in range(3))
        text = seeded.choice(PATTERNS).format(a=a, b=b, c=c)
        return seeded.choice([text, f"GlobalTokens(({a}, {a + b}))", f"Longformer({a}, ({b},))"])

    def expression(depth: int) -> str:
        if depth == 0 or seeded.random() < 0.3:
            return leaf()
        if seeded.random() < 0.25:
            return f"~({expression(depth - 1)})"
        joint = seeded.choice("&|")
        return f"({expression(depth - 1)}) {joint} ({expression(depth - 1)})"

    calls: list[tuple[str, list[Any]]] = [
        ("pattern", [expression(seeded.randint(0, 3)), 24]) for _ in range(250)
    ]

    def oracle(text: str, n: int) -> dict[str, Any]:
        found = parse(text)
        return {
            "text": str(found),
            "rows": ["".join("01"[bool(found.sees(i, j))] for j in range(n)) for i in range(n)],
            "pairs": pairs(found, n),
        }

    wrong, refused = compared([str(call[1]) for call in calls], calls, oracle)
    assert not wrong, "\n".join(wrong[:20])
    assert not refused


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Causal",
        "Causal(1)",
        "SlidingWindow()",
        "SlidingWindow(0)",
        "SlidingWindow(True)",
        "SlidingWindow(4, include_self=1)",
        "SlidingWindow(4, include_self=False, right=1)",
        "SlidingWindow(4, window=4)",
        "SlidingWindow(1.5)",
        "SlidingWindow(-1)",
        "SlidingWindow(007)",
        "Sinks(2) |",
        "Sinks(2) || Sinks(3)",
        "(Sinks(2)",
        "Sinks(2))",
        "Sink(2)",
        "Documents(())",
        "Documents(3)",
        "GlobalTokens((3, 2))",
        "Causal() and Full()",
        "__import__('os')",
        "~" * 300 + "Causal()",
        f"SlidingWindow({2**49})",
        "|".join(["Full()"] * 20_000),
    ],
)
def test_texts_that_python_refuses_are_refused_in_one_sentence(text: str) -> None:
    if not text.startswith("~"):  # deeper than anybody writes: Python reads it all the same
        with pytest.raises((ValueError, TypeError)):
            parse(text)
    (answer,) = run([("pattern", [text, 4])])
    assert "allowed" in answer["error"]
    assert "\n" not in answer["error"]


def test_policies_are_read_and_written_alike() -> None:
    seeded = random.Random(8)
    texts = [text for text in (policy(seeded) for _ in range(100)) if text is not None]
    texts += ["keep-all", " window : 4 ", "window:4,block=1", "sinks:0+window:1,block=3"]
    texts += ["window:0", "sinks:4", "window:4,block=2,block=3", "heavy:1", "window:x", "", "h2o"]
    texts += ["snap : 448 + window : 64, block=128", "snap:4+window:1,neighbours=0,observed=64"]
    texts += ["snap:4", "snap:4+heavy:4", "snap:4+window:4,observed=0"]
    texts += ["heavy:4+window:4,observed=1", "snap:4+window:4,block=15"]
    texts += ["snap:4+window:4,neighbours=-1", "toString:4"]
    for text, answer in zip(texts, run([("policy", [text]) for text in texts]), strict=True):
        if "value" in answer:
            assert answer["value"] == str(parse_policy(text))
            continue
        # Python has forms besides that no figure of the page has.
        with pytest.raises(ValueError, match=re.escape(answer["error"].partition(";")[0])):
            parse_policy(text)


def test_sizes_are_printed_as_the_command_line_prints_them() -> None:
    seeded = random.Random(9)
    counts = [0, 1, 1023, 1024, 2**20 - 1, 2**20, 2**30, 5 * 10**12]
    counts += [int(2 ** seeded.uniform(0, 45)) for _ in range(300)]
    calls: list[tuple[str, list[Any]]] = [("shown", [count]) for count in counts]
    wrong, _ = compared([str(count) for count in counts], calls, shown)
    assert not wrong, "\n".join(wrong[:20])


def test_experts_that_some_token_takes_are_the_planners_for_any_batch() -> None:
    experts = {(s.experts.total, s.experts.active) for s in map(model, MODELS) if s.experts}
    some = [(*each, tokens) for each in sorted(experts) for tokens in range(1, 400)]
    calls: list[tuple[str, list[Any]]] = [("distinct", list(each)) for each in some]
    wrong, _ = compared([str(each) for each in some], calls, distinct)
    assert not wrong, "\n".join(wrong[:20])


def test_a_figure_that_is_off_by_one_is_found() -> None:
    """The comparison itself: one byte, one bit of a double, or a row too few turn it red."""
    right = plan("mistral-7b", 131_072).as_dict()
    for key, value in (
        ("weights", right["weights"] + 1),
        ("stack_of_the_cache", right["stack_of_the_cache"] * (1 + 2**-52)),
        ("kinds", []),
    ):
        assert differences({**right, key: value}, right)
    assert not differences(right, right)


def test_presets_have_no_part_that_the_page_does_not_know() -> None:
    for name in MODELS:
        assert not model(name).chunked
        assert not model(name).shares
