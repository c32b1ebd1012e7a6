"""A model's shape from a Hugging Face `config.json`, its weights counted to the last one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnspan.planner import weights
from attnspan.planner.families import FAMILIES, TEXT
from attnspan.planner.fields import MOST_LAYERS, Fields, shown
from attnspan.planner.spec import ModelSpec

_MOST_BYTES = 16 * 2**20
_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
_WINDOWS = {_SLIDING: "sliding_window", _CHUNKED: "attention_chunk_size"}


def from_config(config: str | Path | Mapping[str, Any], name: str | None = None) -> ModelSpec:
    """Reads a Hugging Face `config.json`: its path, its folder's, or what it holds.

    A field that is left out has the value that transformers gives it. Of a model that takes images
    or sound too the decoder of text is read, and counted alone. A `quantization_config` is passed
    over: weights are counted, whatever holds them.

    Raises:
        ValueError: one sentence: it is no config, a figure is wrong, or its model has parts that
            the planner can't count.

    >>> spec = from_config({"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
    ...     "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100})
    >>> spec.kv_heads, spec.head_dim, spec.parameters
    (4, 16, 95040)
    """
    if isinstance(config, Mapping):
        given, source = config, "a config"
    else:
        given, source = _read(Path(config))
    fields = _fields(given, source)
    family = fields.family
    layers, hidden = (
        fields.count("num_hidden_layers", most=MOST_LAYERS),
        fields.count("hidden_size"),
    )
    vocabulary, tied = fields.count("vocab_size"), fields.flag("tie_word_embeddings")
    kinds = _kinds(fields, layers)
    shares = _shares(fields, kinds)
    heads = weights.heads(fields, hidden)
    mixers = weights.feed_forward(fields, layers, hidden)
    tables, further = weights.per_layer(fields, layers, hidden) if family.per_layer else (0, 0)

    borrowers = len(shares) - shares.count(None)
    attention = (layers - borrowers) * weights.attention(fields, heads, hidden)
    attention += borrowers * weights.attention(fields, heads, hidden, own=False)
    norms = (layers * family.norms + 1) * hidden * family.norm
    aside = tables + (vocabulary if family.output_bias else 0)
    parameters = vocabulary * hidden * (1 if tied else 2) + aside + further
    parameters += attention + norms + mixers.weights + mixers.routers
    return ModelSpec(
        name=name or _name(fields),
        layers=layers,
        hidden=hidden,
        intermediate=mixers.intermediate,
        heads=heads.query,
        kv_heads=heads.kv,
        head_dim=heads.dim,
        vocabulary=vocabulary,
        parameters=parameters,
        feed_forward=mixers.weights,
        windows=tuple(fields.count(_WINDOWS[kind]) if kind != _FULL else None for kind in kinds),
        tied=tied,
        source=source,
        active=None if mixers.experts is None else parameters - mixers.idle,
        trained_length=fields.optional("max_position_embeddings"),
        chunked=_CHUNKED in kinds,
        experts=mixers.experts,
        latent=heads.latent,
        shares=shares,
        learned_sinks=family.sinks,
        family=fields.kind,
        aside=aside,
    )


def _read(path: Path) -> tuple[Mapping[str, Any], str]:
    file = path / "config.json" if path.is_dir() else path
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise ValueError(f"model {file}: it is no file; a config.json is allowed")
        if size > _MOST_BYTES:
            raise ValueError(f"model {file}: it has {size} bytes; a config of 16 MiB is allowed")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"model {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"model {file}: it is no text in UTF-8") from None
    try:
        given = json.loads(text)
    except RecursionError:
        raise ValueError(f"model {file}: it is nested too deep for a config") from None
    except ValueError as error:
        raise ValueError(f"model {file}: it is no JSON ({error})") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"model {file}: it holds no config; an object is allowed")
    return given, str(file)


def _fields(given: Mapping[str, Any], source: str) -> Fields:
    """Those of the decoder of text, with the defaults of its family."""
    inner, outer = given.get("text_config"), given
    kind = given.get("model_type")
    if inner is not None:
        if not isinstance(inner, Mapping):
            raise ValueError(f"{source}: text_config is {shown(inner)}; an object is allowed")
        kind = inner.get("model_type") or TEXT.get(str(kind), kind)
        given = inner
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or not isinstance(kind, str):
        raise ValueError(
            f"{source}: model_type is {shown(kind)}; allowed are {', '.join(sorted(FAMILIES))}"
        )
    values = {**family.defaults, **given}
    # Whether both share weights is said outside, where the output layer is.
    if given.get("tie_word_embeddings") is None:
        tied = outer.get("tie_word_embeddings")
        values["tie_word_embeddings"] = (
            family.defaults["tie_word_embeddings"] if tied is None else tied
        )
    routed = family.routed
    if routed is not None and routed.other is not None and given.get(routed.total) is None:
        values[routed.total] = given.get(routed.other) or values[routed.total]
    fields = Fields(kind, family, values, source)
    foreign = {
        "num_experts": routed is None,
        "num_local_experts": routed is None,
        "n_routed_experts": routed is None,
        "kv_lora_rank": not family.latent,
        "num_kv_shared_layers": not family.per_layer,
        "attention_chunk_size": "attention_chunk_size" not in family.defaults,
        "per_layer_config": True,
        "use_bidirectional_attention": True,
    }
    for key, strange in foreign.items():
        if strange and values.get(key):
            raise fields.wrong(key, f"no {kind} decoder with that is known here")
    return fields


def _name(fields: Fields) -> str:
    given = fields.values.get("_name_or_path")
    return given if isinstance(given, str) and given.isprintable() and given else fields.kind


def _kinds(fields: Fields, layers: int) -> tuple[str, ...]:
    """What each layer sees, as transformers reads it: `layer_types`, or the family's rule."""
    family = fields.family
    if family.windows == "none":
        return (_FULL,) * layers
    narrow = _CHUNKED if "attention_chunk_size" in family.defaults else _SLIDING
    off = "use_sliding_window" in family.defaults and not fields.flag("use_sliding_window")
    window = None if off else fields.optional(_WINDOWS[narrow])
    if family.windows == "all":
        return (_FULL if window is None else narrow,) * layers
    given = fields.values.get("layer_types")
    if given is None:
        kinds = tuple(narrow if slides else _FULL for slides in _rule(fields, layers, window))
    elif (
        not isinstance(given, list | tuple)
        or len(given) != layers
        or any(kind not in (_FULL, narrow) for kind in given)
    ):
        raise fields.wrong("layer_types", f"a list of {layers} of {_FULL} and {narrow} is allowed")
    else:
        kinds = tuple(given)
    if narrow in kinds and window is None:
        key = "use_sliding_window" if off else _WINDOWS[narrow]
        raise fields.wrong(key, f"with layers of {narrow} they need a window")
    return kinds


def _rule(fields: Fields, layers: int, window: int | None) -> list[bool]:
    """Whether each layer has a window."""
    every = fields.family.every
    match every:
        case "window":
            return [window is not None] * layers
        case "last":
            first = fields.count("max_window_layers", least=0)
            return [window is not None and i >= first for i in range(layers)]
        case "even":
            last = fields.count("max_window_layers", least=0)
            return [window is not None and i % 2 == 0 and i < last for i in range(layers)]
        case "rope":
            step = fields.count("no_rope_layer_interval")
            rotates = fields.listed("no_rope_layers", 2)
            if not rotates:
                rotates = [int((i + 1) % step != 0) for i in range(layers)]
            if len(rotates) != layers:
                raise fields.wrong("no_rope_layers", f"null or {layers} of 0 and 1 are allowed")
            # Llama 4's layers that rotate see a chunk; SmolLM3's that don't have a window.
            if "attention_chunk_size" in fields.family.defaults:
                return [bool(each) for each in rotates]
            return [window is not None and not each for each in rotates]
    every = fields.count(every) if isinstance(every, str) else every
    return [(i + 1) % every != 0 for i in range(layers)]


def _shares(fields: Fields, kinds: tuple[str, ...]) -> tuple[int | None, ...]:
    """The last layers read keys and values of the last before them that sees as much."""
    if not fields.family.per_layer:
        return ()
    number = fields.count("num_kv_shared_layers", least=0, most=len(kinds) - 1)
    if not number:
        return ()
    own = len(kinds) - number
    sources = {kind: layer for layer, kind in enumerate(kinds[:own])}
    if set(kinds) != set(sources):
        raise fields.wrong(
            "num_kv_shared_layers", "for each kind of layer one with keys and values is needed"
        )
    return (*(None,) * own, *(sources[kind] for kind in kinds[own:]))
