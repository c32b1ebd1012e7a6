"""Pages and pictures of the documentation that are made from the code: `python docs/generate.py`.

With `--check` nothing is written, and what isn't current is named; exit code 1 then.
"""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from attnspan.cli import app
from attnspan.explorer import figures
from attnspan.explorer.drawing import draw, save
from attnspan.explorer.kept import kept
from attnspan.patterns import pairs, parse
from attnspan.planner.engines import cache_bytes
from attnspan.planner.plan import plan
from attnspan.planner.presets import model
from attnspan.planner.quantities import shown
from attnspan.policies import SinkWindow, pyramid
from attnspan.policies import parse as parse_policy

HERE = Path(__file__).parent
MEASURED = HERE.parent / "benchmarks" / "results" / "doctor_windowed.json"
TOKENS = 131_072
SMALL = 2.6


@dataclass(frozen=True)
class Shown:
    """A pattern or policy of the galleries: drawn small, counted at a context of 128K."""

    name: str
    small: str
    large: str
    says: str
    papers: tuple[tuple[str, str], ...] = ()


SPARSE = ("Sparse Transformers", "https://arxiv.org/abs/1904.10509")
LONGFORMER = ("Longformer", "https://arxiv.org/abs/2004.05150")
STREAMING = ("StreamingLLM", "https://arxiv.org/abs/2309.17453")
MISTRAL = ("Mistral 7B", "https://arxiv.org/abs/2310.06825")

PATTERNS = (
    Shown("Full", "Full()", "Full()", "Every query sees every key, later ones too."),
    Shown("Causal", "Causal()", "Causal()", "A query sees itself and all before it."),
    Shown(
        "Sliding window",
        "SlidingWindow(8)",
        "SlidingWindow(4096)",
        "The nearest W keys up to the query itself.",
        (MISTRAL, LONGFORMER),
    ),
    Shown(
        "Window before the token",
        "SlidingWindow(8, include_self=False)",
        "SlidingWindow(4096, include_self=False)",
        "The W keys before the query, without itself: the first query sees none, and gets zeros.",
    ),
    Shown(
        "Dilated window",
        "SlidingWindow(6, dilation=3)",
        "SlidingWindow(4096, dilation=3)",
        "Every third key: as many pairs as the window, three times as far.",
        (LONGFORMER,),
    ),
    Shown(
        "Window on both sides",
        "SlidingWindow(6, right=5)",
        "SlidingWindow(2048, right=2047)",
        "For encoders: keys after the query too.",
        (LONGFORMER,),
    ),
    Shown(
        "Sinks and window",
        "SlidingWindow(8) | Sinks(2)",
        "SlidingWindow(4096) | Sinks(4)",
        "A window, and the first tokens for ever.",
        (STREAMING,),
    ),
    Shown(
        "Strided",
        "Strided(4, 8)",
        "Strided(2048, 64)",
        "The nearest W keys, and before them every s-th, counted from the query.",
        (SPARSE,),
    ),
    Shown(
        "Blockwise",
        "Blockwise(8)",
        "Blockwise(4096)",
        "Tokens see each other within blocks.",
        (("Blockwise self-attention", "https://arxiv.org/abs/1911.02972"),),
    ),
    Shown(
        "Blockwise with the block before",
        "Blockwise(8, before=True)",
        "Blockwise(4096, before=True)",
        "Their own block, and the one before it.",
    ),
    Shown(
        "Global tokens",
        "GlobalTokens((0, 12))",
        "GlobalTokens(64)",
        "Some tokens are seen by all after them, and see all before them.",
        (LONGFORMER, ("BigBird", "https://arxiv.org/abs/2007.14062")),
    ),
    Shown(
        "Longformer",
        "Longformer(6, 2)",
        "Longformer(4096, 64)",
        "A window and global tokens.",
        (LONGFORMER,),
    ),
    Shown(
        "Longformer on both sides",
        "Longformer(5, 2, right=4)",
        "Longformer(2048, 64, right=2047)",
        "As in the paper, for encoders.",
        (LONGFORMER,),
    ),
    Shown(
        "Documents",
        "Documents((12, 7, 13))",
        f"Documents(({', '.join(['4096'] * 32)}))",
        "Packed documents: tokens see their own alone. Counted with 32 of 4,096 tokens.",
    ),
    Shown(
        "Combined",
        "Documents((20, 12)) & (SlidingWindow(6) | Sinks(1))",
        "Documents((65536, 65536)) & (SlidingWindow(4096) | Sinks(1))",
        "`&`, `|` and `~` join any of them.",
    ),
    Shown(
        "Left out",
        "Causal() & ~SlidingWindow(8)",
        "Causal() & ~SlidingWindow(4096)",
        "What a window leaves out of the past.",
    ),
)

POLICIES = (
    Shown("Keep all", "keep-all", "keep-all", "Everything stays: exact, and it grows."),
    Shown("Window", "window:8", "window:4096", "The last W tokens stay.", (MISTRAL,)),
    Shown(
        "Sinks and window",
        "sinks:2+window:6",
        "sinks:4+window:4092",
        "The first S and the last W stay; positions count inside the cache.",
        (STREAMING,),
    ),
    Shown(
        "Heavy hitters",
        "heavy:4+window:4,block=1",
        "heavy:2048+window:1985",
        "For each KV head the H tokens with the most attention received, and the last W.",
        (("H2O", "https://arxiv.org/abs/2306.14048"),),
    ),
    Shown(
        "SnapKV",
        "snap:4+window:4,observed=2,neighbours=1,block=2",
        "snap:2048+window:1985",
        "For each KV head the H that the latest queries look at, with neighbours, and the last W.",
        (("SnapKV", "https://arxiv.org/abs/2404.14469"),),
    ),
    Shown(
        "Compressive",
        "compressive:window=6,memory=3,rate=3,sinks=1,block=1",
        "compressive:window=3002,memory=1024,rate=4",
        "What leaves the window is pooled R to one, into M slots (green).",
        (("Compressive Transformer", "https://arxiv.org/abs/1911.05507"),),
    ),
)


def commands() -> str:
    """Every command's help, as the command line prints it."""
    parts = [
        "# Commands",
        "",
        _filled(
            "Made from `--help` by `docs/generate.py`. Commands that give figures have `--json`, "
            "and work when piped. They exit with 0 on success, 2 on bad input with one sentence on "
            "standard error, and 1 on failure."
        ),
        "",
    ]
    for path, command in _walk(app, ()):
        context = click.Context(command, info_name=" ".join(("attnspan", *path)))
        context.show_default = True
        context.help_option_names = ["-h", "--help"]
        with click.Context(app, info_name="attnspan", terminal_width=84).scope():
            formatter = click.HelpFormatter(width=84)
            command.format_help(context, formatter)
        level = "#" * min(4, len(path) + 1)
        parts += [f"{level} attnspan {' '.join(path)}", "", "```text"]
        parts += [line.rstrip() for line in formatter.getvalue().rstrip().splitlines()]
        parts += ["```", ""]
    return "\n".join(parts)


def _walk(group: click.Group, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    found = []
    for name, command in sorted(group.commands.items()):
        found.append(((*path, name), command))
        if isinstance(command, click.Group):
            found += _walk(command, (*path, name))
    return found


def _filled(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _papers(each: Shown) -> str:
    return ", ".join(f"[{name}]({url})" for name, url in each.papers)


def _slug(each: Shown) -> str:
    return each.name.lower().replace(" ", "-")


def pattern_gallery() -> str:
    causal = pairs(parse("Causal()"), TOKENS)
    parts = [
        "# Gallery of patterns",
        "",
        _filled(
            "Rows are queries, columns keys; the query's own key is orange. Each is drawn over 32 "
            "tokens by `attnspan figure pattern` and counted over 131,072: the pairs that are "
            f"computed, beside causal attention's {causal:,}. [Patterns and "
            "attention](patterns.md) has the definitions."
        ),
        "",
    ]
    for each in PATTERNS:
        count = pairs(parse(each.large), TOKENS)
        large = each.large if len(each.large) < 90 else "Documents((4096, ...))"
        parts += [
            f"## {each.name}",
            "",
            f"![Which query sees which key under {each.small}](images/patterns/{_slug(each)}.svg)",
            "",
            each.says + (f" Paper: {_papers(each)}." if each.papers else ""),
            "",
            f"`{large}` over 128K tokens: {count:,} pairs, {_share(count / causal)} causal's.",
            "",
        ]
    return "\n".join(parts)


def _share(ratio: float) -> str:
    return f"{ratio:.3g} of" if ratio < 1 else "equal to" if ratio == 1 else f"{ratio:.3g} times"


def policy_gallery() -> str:
    parts = [
        "# Gallery of policies",
        "",
        _filled(
            "A row for each newest token, which is orange; blue are the tokens that the cache "
            "holds then in slots of their own, green those that share a pooled one. Drawn by "
            "`attnspan figure policy`. Where a policy decides by attention, that is made up in the "
            "picture: token 0 and every seventh from the fifth on get much. Costs are `attnspan "
            "plan llama-3.1-8b --context 128K` with that policy: keys and values in bf16, int8 and "
            "int4, and a decoded token on an H100 in bf16, weights included. [Policies and "
            "storages](policies.md) has the rules."
        ),
        "",
    ]
    for each in POLICIES:
        made = {
            storage: plan("llama-3.1-8b", TOKENS, policy=each.large, storage=storage)
            for storage in ("dense", "int8", "int4")
        }
        sizes = " / ".join(shown(found.cache.total) for found in made.values())
        step = made["dense"].decode
        assert step is not None
        parts += [
            f"## {each.name}",
            "",
            f"![What {each.small} keeps](images/policies/{_slug(each)}.svg)",
            "",
            each.says + (f" Paper: {_papers(each)}." if each.papers else ""),
            "",
            f"`{each.large}`: {sizes}; a token in {step.seconds * 1e3:.2f} ms.",
            "",
        ]
    spec = model("llama-3.1-8b")
    heads = parse_policy(f"heads({'; '.join(['keep-all', *['sinks:4+window:4092'] * 7])})")
    layers = pyramid(lambda tokens: SinkWindow(4, tokens - 4), 4096, spec.layers)
    sizes = [shown(cache_bytes(spec, TOKENS, policy=policy).total) for policy in (heads, layers)]
    parts += [
        "## By head and by layer",
        "",
        _filled(
            "`heads(SPEC; SPEC; ...)` gives each KV head its own policy, as "
            "[DuoAttention](https://arxiv.org/abs/2410.10819) keeps retrieval heads full: with one "
            f"of eight heads full and seven of `sinks:4+window:4092`, {sizes[0]} in bf16. "
            "`layers(SPEC; SPEC; ...)` gives each layer its own; `pyramid` makes budgets "
            "that fall with depth, as [PyramidKV](https://arxiv.org/abs/2406.02069) has them: "
            f"{sizes[1]} where a layer has 4,096 tokens on average."
        ),
        "",
    ]
    return "\n".join(parts)


def pictures() -> dict[str, bytes]:
    """The galleries' pictures and the figures, by their path."""
    made: dict[str, Any] = {
        "figures/memory": (figures.memory("mistral-7b", TOKENS), 7.0),
        "figures/reach": (figures.reach(None, window=32, layers=4, measured=MEASURED), 7.0),
        "figures/ring": (figures.ring("Causal()", TOKENS, 8), 7.0),
        "figures/stack": (
            figures.stack("mistral-7b", TOKENS, policy="sinks:4+window:4092", storage="int8"),
            7.0,
        ),
    }
    for each in PATTERNS:
        made[f"patterns/{_slug(each)}"] = (figures.matrix(each.small, 32), SMALL)
    for each in POLICIES:
        made[f"policies/{_slug(each)}"] = (kept(each.small, 32), SMALL)
    return {
        f"images/{name}.svg": save(draw(found, width=width), "svg")
        for name, (found, width) in made.items()
    }


def everything() -> dict[str, bytes]:
    """All that is made, by its path in docs/."""
    pages = {
        "commands.md": commands(),
        "pattern-gallery.md": pattern_gallery(),
        "policy-gallery.md": policy_gallery(),
    }
    return {name: text.encode() for name, text in pages.items()} | pictures()


def main(check: bool) -> int:
    old = []
    for name, data in everything().items():
        path = HERE / name
        if not path.exists() or path.read_bytes() != data:
            old.append(name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    if old:
        print(f"{'not current' if check else 'written'}: {', '.join(old)}")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
