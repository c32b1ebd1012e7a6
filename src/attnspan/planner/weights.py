"""How many weights the parts of a model have."""

from __future__ import annotations

from dataclasses import dataclass

from attnspan.planner.fields import Fields
from attnspan.planner.spec import Experts, Latent


@dataclass(frozen=True)
class Heads:
    """Of a layer; with `latent` a head of `head_dim` has a value of another width."""

    query: int
    kv: int
    dim: int
    latent: Latent | None


def heads(fields: Fields, hidden: int) -> Heads:
    """
    Raises:
        ValueError: heads that KV heads don't divide, or whose width isn't known.
    """
    query = fields.count("num_attention_heads")
    if fields.family.latent:
        latent = Latent(
            rank=fields.count("kv_lora_rank"),
            rope=fields.count("qk_rope_head_dim"),
            nope=fields.count("qk_nope_head_dim"),
            value=fields.count("v_head_dim"),
            query_rank=fields.optional("q_lora_rank"),
        )
        return Heads(query, query, latent.nope + latent.rope, latent)
    plain = fields.family.plain_heads
    kv = query if plain else fields.optional("num_key_value_heads") or query
    if query % kv:
        raise ValueError(
            f"{fields.source}: num_attention_heads is {query} and num_key_value_heads {kv}; a "
            "multiple of the latter is allowed"
        )
    given = (fields.values.get("head_dim"), fields.family.defaults["head_dim"])
    if given != (None, None) and not plain:
        return Heads(query, kv, fields.count("head_dim"), None)
    if hidden % query:
        raise ValueError(
            f"{fields.source}: hidden_size is {hidden} and num_attention_heads {query}; without a "
            "head_dim a multiple of the latter is allowed"
        )
    return Heads(query, kv, hidden // query, None)


def attention(fields: Fields, heads: Heads, hidden: int, *, own: bool = True) -> int:
    """Of one layer, its norms of queries and keys included.

    Args:
        own: it makes keys and values; else it reads another's, and has no weights for them.
    """
    family = fields.family
    qkv_bias, out_bias = fields.switch(family.qkv_bias), fields.switch(family.out_bias)
    out = hidden if out_bias else 0
    if heads.latent is not None:
        return _latent(heads.latent, heads.query, hidden, qkv_bias) + out
    query, key = heads.query * heads.dim, heads.kv * heads.dim
    total = 2 * hidden * query + out
    total += query if qkv_bias else 0
    total += heads.query if family.sinks else 0
    if own:
        total += 2 * (hidden + int(qkv_bias)) * key
    if family.qk_norm != "none" and fields.switch(family.qk_norm_if or True):
        widths = (heads.dim, heads.dim) if family.qk_norm == "head" else (query, key)
        total += family.norm * (sum(widths) if own else widths[0])
    return total


def _latent(latent: Latent, heads: int, hidden: int, bias: bool) -> int:
    """Matrices down to the ranks and up to the heads, with a norm in between, and the output's."""
    query = heads * (latent.nope + latent.rope)
    down = latent.rank + latent.rope
    total = (hidden + int(bias)) * down + latent.rank
    total += latent.rank * heads * (latent.nope + latent.value) + heads * latent.value * hidden
    rank = latent.query_rank
    if rank is None:
        return total + hidden * query
    return total + (hidden + int(bias)) * rank + rank + rank * query


@dataclass(frozen=True)
class FeedForward:
    """Of all layers.

    Attributes:
        weights: all of them, without routers.
        routers: what chooses experts, and weighs the shared ones.
        idle: those of experts that a token doesn't take.
        intermediate: width of a layer without experts; where there is none, of an expert.
    """

    weights: int
    routers: int
    idle: int
    intermediate: int
    experts: Experts | None


def feed_forward(fields: Fields, layers: int, hidden: int) -> FeedForward:
    """
    Raises:
        ValueError: more experts taken than there are, or widths that don't fit.
    """
    routed = fields.family.routed
    if routed is None:
        widths = _widths(fields, layers)
        weights = sum(_mlp(fields, hidden, width) for width in widths)
        return FeedForward(weights, 0, 0, max(widths), None)
    sparse = _sparse(fields, layers)
    dense_width = fields.count(routed.dense_width)
    dense = (layers - sparse) * _mlp(fields, hidden, dense_width)
    if not sparse:
        return FeedForward(dense, 0, 0, dense_width, None)
    total, width = fields.count(routed.total), fields.count(routed.width)
    taken = fields.count("num_experts_per_tok", most=total)
    one = 3 * hidden * width + (2 * width + hidden if routed.bias else 0)
    router = (hidden + int(routed.bias)) * total
    shared = routed.shared
    shared = fields.count(shared, least=0) if isinstance(shared, str) else shared
    if routed.shared_width is not None:
        together = fields.count(routed.shared_width)
        shared, rest = divmod(together, width)
        if rest:
            raise fields.wrong(
                routed.shared_width, f"a multiple of {routed.width}, which is {width}, is allowed"
            )
        router += hidden
    layer = total * one + (_mlp(fields, hidden, shared * width) if shared else 0)
    return FeedForward(
        weights=dense + sparse * layer,
        routers=sparse * router,
        idle=sparse * (total - taken) * one,
        intermediate=dense_width if sparse < layers else width,
        experts=Experts(total, taken, width, sparse, shared),
    )


def _mlp(fields: Fields, hidden: int, width: int) -> int:
    inner = 2 if fields.family.gated else 1
    bias = inner * width + hidden if fields.switch(fields.family.mlp_bias) else 0
    return (inner + 1) * hidden * width + bias


def _widths(fields: Fields, layers: int) -> list[int]:
    given = fields.values.get("intermediate_size")
    if not fields.family.per_layer or not isinstance(given, list | tuple):
        return [fields.count("intermediate_size")] * layers
    widths = fields.listed("intermediate_size", 2**30) or []
    if len(widths) != layers or 0 in widths:
        raise fields.wrong("intermediate_size", f"{layers} whole numbers of at least 1 are allowed")
    return widths


def _sparse(fields: Fields, layers: int) -> int:
    """How many layers have experts."""
    match fields.family.routed and fields.family.routed.dense:
        case "first":
            return max(0, layers - fields.count("first_k_dense_replace", least=0))
        case "sparse":
            step = fields.count("decoder_sparse_step")
            without = set(fields.listed("mlp_only_layers", layers) or [])
            return sum(1 for i in range(step - 1, layers, step) if i not in without)
        case "listed":
            given = fields.listed("moe_layers", layers)
            step = fields.count("interleave_moe_layer_step")
            return len(range(step - 1, layers, step) if given is None else set(given))
    return layers


def per_layer(fields: Fields, layers: int, hidden: int) -> tuple[int, int]:
    """Gemma 3n's further parts: weights that are looked up, and weights that are multiplied with.

    It has several residual streams that are mixed (AltUp), a low-rank path beside each attention
    (LAuReL), and a second embedding, with a few channels for each layer.
    """
    inputs, rank = fields.count("altup_num_inputs"), fields.count("laurel_rank")
    width = fields.count("hidden_size_per_layer_input")
    tables = fields.count("vocab_size_per_layer_input") * layers * width
    streams = inputs**2 + inputs**3 + hidden * inputs + 2 * hidden
    low_rank = 2 * hidden * rank + hidden
    gate = 2 * hidden * width + hidden
    once = hidden * layers * width + width + 2 * (inputs - 1) * hidden**2
    return tables, layers * (streams + low_rank + gate) + once
