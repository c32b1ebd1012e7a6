"""What transformers' decoders hold at each step of a layer, in prefill.

Followed through the code of transformers 5.23 (https://github.com/huggingface/transformers,
`models/*/modeling_*.py`, `integrations/sdpa_attention.py`, `masking_utils.py`) and through torch
2.13's kernel of attention for CPUs
(https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).
Python keeps a tensor while a name in a running function stands for it: so the embeddings and the
layer's input live through every step, and eager attention's weights through the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from attnspan.planner.spec import ModelSpec

Parts = dict[str, int]


@dataclass(frozen=True)
class Built:
    """How a family's decoder layer is put together.

    Attributes:
        order: norms before attention and feed-forward; after them; or both fed side by side from
            one residual stream, each by a norm of its own ("beside") or one for both ("shared").
        fused: queries, keys and values are slices of one product, which lives through attention.
        mlp: a gate and another half; both in one product; or no gate.
        biased: experts have biases, and a gate that clamps both halves.
        weighed: experts' outputs are weighed in fp32.
        turning: tensors as large as the queries (or keys) that rotating them holds besides.
        wide: rotation in fp32, from angles in fp32 or from copies of queries and keys.
        still: layers that see everything don't rotate.
        copied: attention's output comes out head by head, and is copied token by token.
        angles: kinds of rotary embeddings, or the share of a head that the only kind rotates.
    """

    order: Literal["pre", "post", "beside", "shared"] = "pre"
    fused: bool = False
    mlp: Literal["gated", "fused", "plain"] = "gated"
    biased: bool = False
    weighed: bool = False
    turning: float = 3
    wide: Literal["", "angles", "copies"] = ""
    still: bool = False
    copied: bool = False
    angles: float = 1


_BUILT = {
    "llama": Built(),
    "mistral": Built(),
    "qwen2": Built(),
    "qwen3": Built(),
    "qwen3_moe": Built(),
    "gemma2": Built(),
    "gemma3_text": Built(angles=2),
    "granite": Built(),
    "smollm3": Built(),
    "mixtral": Built(weighed=True),
    "deepseek_v3": Built(weighed=True),
    "cohere": Built("shared", wide="copies"),
    "cohere2": Built("shared", wide="copies", still=True),
    "gpt_neox": Built("beside", fused=True, mlp="plain", turning=1.5, copied=True, angles=0.25),
    "gpt_oss": Built(biased=True, turning=2, copied=True, angles=0.5),
    "olmo2": Built("post", wide="angles"),
    "olmo3": Built("post", wide="angles", angles=2),
    "phi3": Built(fused=True, mlp="fused", copied=True),
}
FAMILIES = tuple(sorted(_BUILT))
"""Those whose layers were followed; others are taken to be built as Llama's."""


@dataclass(frozen=True)
class Step:
    """One step of one layer: its tensors by name, and those of attention's working memory."""

    name: str
    parts: Parts
    working: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def steps(
    spec: ModelSpec,
    new: int,
    tokens: int,
    *,
    batch: int,
    itemsize: int,
    eager: bool,
    threads: int | None,
    packs: bool,
) -> Iterator[Step]:
    """Every step of the last call of a prefill that brings `new` of all `tokens` tokens.

    Bytes are above weights and above the whole cache as it stands at the end: a layer that has not
    run yet holds less of it, which counts as bytes below. `threads` are those of a CPU; None is a
    GPU, whose kernels neither have a tile in memory nor copy a factor of another dtype. `packs`:
    its CPU multiplies bf16 by tiles (Intel's AMX), for which torch lays keys and values out anew.
    """
    built = _BUILT.get(spec.family, Built())
    shape = _Shape(spec, new, tokens, batch, itemsize, eager, threads, packs, built)
    missing = sum(shape.added(window) for window in spec.windows)
    for index, window in enumerate(spec.windows):
        for step in shape.layer(window, first=index == 0):
            if step.name == "storing":
                missing -= shape.added(window)
            parts = {**step.parts, "keys and values that are not stored yet": -missing}
            yield Step(step.name, parts, step.working)
    yield shape.head()


@dataclass(frozen=True)
class _Shape:
    spec: ModelSpec
    new: int
    tokens: int
    batch: int
    itemsize: int
    eager: bool
    threads: int | None
    packs: bool
    built: Built

    @property
    def _mixes(self) -> bool:
        """Whether a product of two dtypes copies the narrower one."""
        return self.itemsize < 4 and self.threads is not None

    def _wide(self, width: int, itemsize: int | None = None) -> int:
        """Bytes of one tensor with so many numbers for each new token."""
        return self.batch * self.new * width * (itemsize or self.itemsize)

    @property
    def hidden(self) -> int:
        return self._wide(self.spec.hidden)

    @property
    def queries(self) -> int:
        return self._wide(self.spec.heads * self.spec.head_dim)

    @property
    def keys(self) -> int:
        return self._wide(self.spec.kv_heads * self.spec.head_dim)

    def _read(self, window: int | None) -> int:
        """Keys that a layer's attention reads: those before, and the new ones."""
        before = self.tokens - self.new
        return self.new + (before if window in (None, 1) else min(before, window - 1))

    def _held(self, window: int | None) -> int:
        """Tokens in whose memory a layer's cache lies before this call."""
        before = self.tokens - self.new
        return before if window in (None, 1) else min(before, window - 1 + self.new)

    def _stored(self, tokens: int) -> int:
        """Bytes of so many tokens of each sequence in one layer's cache."""
        spec, width = self.spec, 2 * self.spec.kv_heads * self.spec.head_dim
        if spec.latent is not None:
            width = spec.latent.rank + spec.latent.rope
        return self.batch * tokens * width * self.itemsize

    def added(self, window: int | None) -> int:
        """Bytes by which a layer's cache grows in this call."""
        return self._stored(self._read(window) - self._held(window))

    def _joined(self, window: int | None) -> int:
        """Old keys, then old values, beside the tensor that they are copied to; a sliding layer
        lets both go at once."""
        old = self._stored(self._held(window))
        return old // 2 if window is None else old

    def _masked(self, window: int | None) -> bool:
        """Whether attention gets a mask: sdpa does without where a plain causal one would do."""
        read = self._read(window)
        if self.eager:
            return True
        if window is not None and read >= window:
            return True
        return read != self.new and self.new > 1

    def _mask(self, window: int | None) -> int:
        """A mask in numbers, for each sequence; as booleans all sequences share one."""
        return self.batch * self.new * self._read(window) * self.itemsize

    @property
    def _all_along(self) -> Parts:
        """What lives from before the first layer to the last."""
        spec = self.spec
        masks = sum(
            self._mask(window) if self.eager else self.new * self._read(window)
            for window in set(spec.windows)
            if self._masked(window)
        )
        item = 4 if self.built.wide == "angles" else self.itemsize
        turned = spec.head_dim if spec.latent is None else spec.latent.rope
        angles = 2 * self.new * turned * item * self.built.angles
        return {
            "embeddings": self.hidden,
            "masks": masks,
            "angles and positions": round(angles) + 8 * self.new,
        }

    def layer(self, window: int | None, first: bool) -> Iterator[Step]:
        built, h, q, k = self.built, self.hidden, self.queries, self.keys
        base: Parts = self._all_along
        if not first:
            base["layer's input"] = h
        inside = {**base}
        if built.order != "post":
            inside["normed input"] = h
        if built.fused:
            inside["queries, keys and values in one"] = q + 2 * k
        if self.spec.latent is not None:
            yield from self._latent(window, inside)
        else:
            yield from self._heads(window, inside)
        weights = self._scores(window) if self.eager else 0
        after = {**base, "attention's weights, still named": weights}
        if built.order in ("beside", "shared"):
            after |= {"attention's output": h, "normed input": h}
        else:
            after["residual stream"] = h
            if built.order == "pre":
                after["normed input"] = h
        for own in self._feed_forward():
            yield Step("feed-forward", {**after, **own})
        after.pop("normed input", None)
        if built.order == "post":
            after["feed-forward's output"] = h
        yield Step("norm", {**after, "norm's own": self._norm()})

    def _heads(self, window: int | None, inside: Parts) -> Iterator[Step]:
        """Attention whose heads have keys and values of their own."""
        built, h, q, k = self.built, self.hidden, self.queries, self.keys
        apart = {} if built.fused else {"queries": q, "keys and values": 2 * k}
        if not (built.still and window is None):
            yield Step("rotation", {**inside, **apart, "rotation's own": self._turning()})
        new = {
            "queries": q,
            "keys and values, new": k if built.fused else 2 * k,
            "keys or values, old": self._joined(window),
        }
        yield Step("storing", {**inside, **new})
        yield self._attention(window, inside)
        output = {"queries": q, "attention's output": q, "its projection": h}
        yield Step("attention's projection", {**inside, **output})
        if built.copied and not self.eager:
            copy = {"queries": q, "attention's output": q, "its copy, token by token": q}
            yield Step("attention's copy", {**inside, **copy})

    def _latent(self, window: int | None, inside: Parts) -> Iterator[Step]:
        """Latent attention: the cache holds latents; all heads' keys and values are made anew."""
        spec, latent, read = self.spec, self.spec.latent, self._read(window)
        assert latent is not None
        stored = latent.rank + latent.rope
        new = {"queries": self.queries, "latents": self._wide(stored)}
        yield Step("storing", {**inside, **new, "latents, old": self._joined(window)})
        expanded = spec.heads * (latent.nope + latent.value + spec.head_dim)
        parts = {
            **inside,
            "queries, their parts and both joined": 2 * self.queries
            + self._wide(spec.heads * latent.rope),
            "latents": self._wide(stored),
            "keys and values of all heads": self.batch * read * expanded * self.itemsize,
        }
        if self.eager:
            working = self._softmax() * self._scores(window)
            parts["scores, and scores anew"] = working
        else:
            # Keys and values differ in width, so torch's CPU computes attention in plain steps.
            wide = max(4, self.itemsize)  # in fp32 at least, from copies of what isn't
            pairs = self._wide(spec.heads * read, 1)
            mask, scores = self.new * read * wide, 2 * self._wide(spec.heads * read, wide)
            working = mask + scores + pairs
            scaled = self._wide(spec.heads * spec.head_dim, wide)
            copied = self.batch * read * spec.heads * (spec.head_dim + latent.value) * wide + scaled
            parts |= {"queries, scaled": scaled, "mask in numbers": mask}
            parts["queries, keys and values in fp32"] = copied if self.itemsize < 4 else 0
            parts |= {"scores, scores anew, and which are infinite": scores + pairs}
        yield Step("attention", parts, working)

    def _turning(self) -> int:
        """Bytes that rotating queries, then keys, holds besides both."""
        built, q, k = self.built, self.queries, self.keys
        tensors = max(built.turning * q, q + built.turning * k)
        if not built.wide or self.itemsize >= 4:
            return round(tensors)
        grow = 4 // self.itemsize
        if built.wide == "copies":
            return round(grow * (q + k + tensors))
        # Two products, and before the second what it multiplies, which a CPU copies.
        return (3 if self._mixes else 2) * grow * q + q

    def _norm(self) -> int:
        """Bytes of a norm of the hidden states, which runs in fp32, its output included."""
        wide = self._wide(self.spec.hidden, 4)
        # After attention the weights multiply in fp32, and a product of two dtypes copies one.
        return (3 if self.built.order == "post" and self._mixes else 2) * wide

    def _scores(self, window: int | None) -> int:
        return self._wide(self.spec.heads * self._read(window))

    def _attention(self, window: int | None, inside: Parts) -> Step:
        spec, q = self.spec, self.queries
        read = self._read(window)
        repeated, heads = 0, spec.kv_heads
        grouped = not self.eager and (self.new == 1 or not self._masked(window))
        # One head's keys are repeated as a view.
        if not grouped:
            heads = spec.heads
        if spec.heads > spec.kv_heads > 1 and not grouped:
            repeated = 2 * self.batch * spec.heads * read * spec.head_dim * self.itemsize
        parts = {**inside, "queries": q, "keys and values, a copy for each query head": repeated}
        if self.eager:
            working = self._softmax() * self._scores(window)
            parts["scores, and scores anew"] = working
            return Step("attention", parts, working)
        mask = self._mask(window) if self._masked(window) else 0
        kernel = self._kernel(read, heads, causal=not self._masked(window))
        parts |= {
            "mask in numbers": mask,
            "attention's output": q,
            "attention kernel's own": kernel,
        }
        return Step("attention", parts, kernel + mask)

    def _softmax(self) -> int:
        """How many times the scores are held at most in eager attention."""
        if self.spec.learned_sinks:  # with a column more, and less their largest
            return 3
        if self.itemsize >= 4:
            return 2
        # Softmax gives fp32, of a copy in fp32; only of fp16 a GPU needs none.
        return 1 + 2 * 4 // self.itemsize

    def _kernel(self, read: int, heads: int, causal: bool) -> int:
        """torch's flash attention over the keys of so many heads: a log-sum-exp, and on a CPU a
        tile for each thread, and what is laid out anew."""
        if self.threads is None:
            return self._wide(self.spec.heads, 4)
        queries = min(256 if self.new >= 768 else 64 if self.new >= 192 else 32, self.new)
        keys = min(512, read)
        tile = queries * (keys + 2 + self.spec.head_dim) * 4
        if self.itemsize < 4:
            tile += queries * keys * self.itemsize
        again = 0
        # Where that pays, by its own rule.
        shared = -(-self.batch * self.spec.heads * -(-self.new // queries) // self.threads)
        products = shared * queries * (min(self.new, read) if causal else read)
        wide = min(self.new, read) >= 64 and products >= 4 * self.batch * heads * read
        if self.packs and self.itemsize == 2 and wide:
            again = 2 * self.batch * heads * read * self.spec.head_dim * self.itemsize
            tile += keys * self.spec.head_dim * self.itemsize
        return self._wide(self.spec.heads, 4) + self.threads * tile + again

    def _feed_forward(self) -> Iterator[Parts]:
        spec, experts = self.spec, self.spec.experts
        if experts is None or experts.layers < spec.layers:
            inner = self._wide(spec.intermediate)
            output = {"feed-forward's output": self.hidden}
            match self.built.mlp:
                case "gated":
                    yield {"gate, other half and their product": 3 * inner}
                    yield {"gate's product": inner, **output}
                case "fused":
                    yield {"gate and other half in one": 2 * inner, "gate, product": 2 * inner}
                    yield {"gate, other half and product": 3 * inner, **output}
                case "plain":
                    yield {"inner layer, before and after": 2 * inner}
                    yield {"inner layer": inner, **output}
        if experts is None:
            return
        # Each token stands as often as it has experts, in the order of the experts.
        hidden, inner = (
            experts.active * self.hidden,
            self._wide(experts.active * experts.intermediate),
        )
        order = experts.active * (4 * 8 + 4 + 2 * self.itemsize) + experts.total * self.itemsize
        routed = {"routing": self._wide(order, 1), "tokens by expert": hidden}
        halves, outputs = (9, 4) if self.built.biased else (4, 3)
        wide = 2 * (4 - self.itemsize) * hidden // self.itemsize if self.built.weighed else 0
        yield {**routed, "experts' halves, gates and product": halves * inner}
        yield {**routed, "experts' outputs, weighed, in order": outputs * hidden + max(0, wide)}
        if experts.shared:
            shared = self._wide(experts.shared * experts.intermediate)
            logits = self._wide(experts.total)
            yield {"routing": logits, "experts' output": self.hidden, "shared expert's": 3 * shared}

    def head(self) -> Step:
        parts = {
            **self._all_along,
            "last layer's output": self.hidden,
            "norm's own": self._norm(),
        }
        return Step("final norm", parts)
