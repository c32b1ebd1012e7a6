"""What a planner knows of a model: its shape, and where the figures come from."""

from __future__ import annotations

from dataclasses import dataclass

from attnspan.planner.reach import bound


@dataclass(frozen=True)
class Experts:
    """Feed-forward layers of which a token takes a few: a mixture of experts.

    Attributes:
        total: experts of a layer that a token chooses from.
        active: those that it takes.
        intermediate: width of one.
        layers: how many layers have them; the others have one feed-forward layer.
        shared: experts that every token takes besides.
    """

    total: int
    active: int
    intermediate: int
    layers: int
    shared: int = 0


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434).

    A token's keys and values of all heads come from `rank` numbers, and its position from `rope`
    channels that the heads share; an engine may hold those, or the heads' own keys and values.

    Attributes:
        rank: numbers from which keys and values are made.
        rope: channels of a key that are rotated, the same for all heads.
        nope: channels of a head's key that are not.
        value: channels of a head's value.
        query_rank: numbers from which queries are made; None: made from the hidden state.
    """

    rank: int
    rope: int
    nope: int
    value: int
    query_rank: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder.

    Attributes:
        name: as a user writes it.
        layers: decoder layers.
        hidden: width of the residual stream.
        intermediate: width of the feed-forward layers; where all have experts, of an expert.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: channels of a head's query and key; of its value too, but for `latent`.
        vocabulary: rows of the embedding.
        parameters: all weights, embeddings included.
        feed_forward: those of the feed-forward layers, all experts included, routers not.
        windows: for each layer its sliding window, the token itself included; None: it sees all.
        tied: the embedding is the output layer too.
        source: where the figures come from.
        active: weights that one token uses, embeddings included; None: all of them.
        trained_length: positions that its config allows; None: it doesn't say.
        chunked: `windows` are chunks counted from token 0, and a query sees its own alone.
        experts: None: every layer has one feed-forward layer.
        latent: None: heads have keys and values of their own, `head_dim` wide.
        shares: for each layer the earlier one whose keys and values it reads; None: its own. Empty:
            all have their own.
        learned_sinks: each head has a logit of its own in the softmax, and no key to it.
        family: `model_type` of its config; empty: not known.
        aside: weights beside the embedding and the output's matrix that no layer multiplies with:
            further embeddings, the output's biases.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    parameters: int
    feed_forward: int
    windows: tuple[int | None, ...]
    tied: bool
    source: str
    active: int | None = None
    trained_length: int | None = None
    chunked: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    shares: tuple[int | None, ...] = ()
    learned_sinks: bool = False
    family: str = ""
    aside: int = 0

    @property
    def active_parameters(self) -> int:
        """Weights that one token uses: experts that it takes, embeddings and output as a whole."""
        return self.parameters if self.active is None else self.active

    @property
    def linear_parameters(self) -> int:
        """Weights that every token is multiplied with, of experts those that it takes.

        An embedding is looked up, and prefill needs the output layer for its last token alone.
        """
        apart = self.vocabulary * self.hidden * (1 if self.tied else 2) + self.aside
        return self.active_parameters - apart

    @property
    def active_feed_forward(self) -> int:
        """Of `feed_forward` what one token uses."""
        return self.feed_forward - (self.parameters - self.active_parameters)

    @property
    def inner_width(self) -> int:
        """The widest that feed-forward layers make a token: one layer's width, or of those with
        experts the width of all that the token takes."""
        if self.experts is None:
            return self.intermediate
        some = (self.experts.active + self.experts.shared) * self.experts.intermediate
        return some if self.experts.layers == self.layers else max(some, self.intermediate)

    @property
    def value_dim(self) -> int:
        """Channels of a head's value."""
        return self.head_dim if self.latent is None else self.latent.value

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Those that see all tokens."""
        return tuple(i for i, window in enumerate(self.windows) if window is None)

    @property
    def sliding_layers(self) -> tuple[int, ...]:
        """Those with a window or a chunk."""
        return tuple(i for i, window in enumerate(self.windows) if window is not None)

    @property
    def owners(self) -> tuple[int, ...]:
        """Layers that hold keys and values of their own."""
        if not self.shares:
            return tuple(range(self.layers))
        return tuple(i for i, source in enumerate(self.shares) if source is None)

    def kv_width(self, layer: int, *, expanded: bool = False) -> int:
        """Numbers that a layer holds of a token: keys and values of all heads.

        Args:
            layer: counted from 0; one that reads another's holds none.
            expanded: with `latent` the heads' own keys and values, not what they are made from.
        """
        if self.shares and self.shares[layer] is not None:
            return 0
        if self.latent is not None and not expanded:
            return self.latent.rank + self.latent.rope
        return self.kv_heads * (self.head_dim + self.value_dim)

    def kv_bytes(self, itemsize: int = 2, *, expanded: bool = False) -> int:
        """Bytes of one token's keys and values in all layers, whatever they see.

        Args:
            itemsize: bytes of a number.
            expanded: as in `kv_width`.
        """
        return itemsize * sum(self.kv_width(i, expanded=expanded) for i in range(self.layers))

    @property
    def reach(self) -> int | None:
        """How many tokens back one can influence the present one at most; None: any number.

        As `attnspan.planner.reach.bound` has it.

        >>> from attnspan.planner.presets import model
        >>> model("mistral-7b").reach == 32 * (4096 - 1), model("gemma-3-1b").reach
        (True, None)
        """
        return bound(self.windows, chunked=self.chunked, shares=self.shares)
