"""Operations, bytes and seconds of a prefill and of one step of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from attnspan.planner.layers import Kind
from attnspan.planner.links import Device, Link
from attnspan.planner.spec import ModelSpec
from attnspan.planner.weight_bytes import read_bytes


@dataclass(frozen=True)
class Phase:
    """The prefill, or one step of decoding, of the whole batch. On a ring: of one device.

    Attributes:
        linear: operations of matrix products with weights, two for each weight and token.
        attention: operations of attention, two for each number that is multiplied.
        bytes: that must be moved at the least.
        seconds: by the device's rates.
        ridge: operations a byte from which on the device computes longer than it reads.
    """

    linear: int
    attention: int
    bytes: int
    seconds: float
    ridge: float

    @property
    def operations(self) -> int:
        return self.linear + self.attention

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes

    @property
    def bound(self) -> str:
        return "compute" if self.intensity >= self.ridge else "memory"


def pair_operations(spec: ModelSpec) -> int:
    """Operations of attention for a pair and query head, in prefill.

    `2 * head_dim` for the score and as many for the value; with latent attention the key is
    `nope + rope` wide and the value as it is.
    """
    if spec.latent is None:
        return 4 * spec.head_dim
    return 2 * (spec.latent.nope + spec.latent.rope) + 2 * spec.latent.value


def read_operations(spec: ModelSpec) -> int:
    """The same for a key that a decoded token reads.

    Latents are read as they are: a query is turned into their space (DeepSeek-V2, section 2.1.2),
    which takes `2 * (rank + rope)` for a score and `2 * rank` for a value.
    """
    if spec.latent is None:
        return 4 * spec.head_dim
    return 2 * (spec.latent.rank + spec.latent.rope) + 2 * spec.latent.rank


def prefill(
    spec: ModelSpec,
    kinds: Sequence[Kind],
    context: int,
    batch: int,
    weights: str,
    device: Device,
    devices: int,
    token: int,
    received: int = 0,
    chunk: int | None = None,
) -> Phase:
    """The output layer sees the last token alone. Weights are read once, of experts those that some
    token takes; keys and values are written once, and read once by each layer; activations aren't
    counted.

    Args:
        received: bytes of others' keys and values that a device of a ring is sent, of all layers
            and one sequence. They too are written and read once.
        chunk: tokens of a step, on one device. Each step reads the weights anew, and the keys that
            its queries see.
    """
    output = spec.vocabulary * spec.hidden
    linear = 2 * batch * (context * spec.linear_parameters + output)
    pairs = sum(kind.layers * kind.pairs for kind in kinds)
    attention = pair_operations(spec) * spec.heads * batch * pairs
    owners = sum(kind.layers for kind in kinds if kind.held)
    size = context if chunk is None else min(chunk, context)
    whole, rest = divmod(context, size)
    moved = whole * read_bytes(spec, weights, batch * size)
    moved += read_bytes(spec, weights, batch * rest) if rest else 0
    if devices == 1:
        read = sum(kind.layers * keys_read(context, size, kind.read) for kind in kinds)
        moved += batch * token * (owners * context + read)
    else:
        own = -(-context // devices) * token * (owners + spec.layers)
        moved += batch * (own + 2 * received)
    steps = whole + (rest > 0)
    return _phase(spec, -(-linear // devices), -(-attention // devices), moved, device, steps)


def keys_read(tokens: int, chunk: int, last: int) -> int:
    """Keys that the steps of a prefill read in a layer, whose last token sees `last` of them.

    A step of c tokens that ends at token b reads `min(b, last + c - 1)`.

    >>> keys_read(100, 100, 8), keys_read(10, 4, 10), keys_read(10, 4, 3)
    (100, 22, 14)
    """
    whole, rest = divmod(tokens, chunk)
    most = last + chunk - 1
    rising = min(whole, most // chunk)
    total = chunk * rising * (rising + 1) // 2 + (whole - rising) * most
    return total + (min(tokens, last + rest - 1) if rest else 0)


def decode(
    spec: ModelSpec,
    kinds: Sequence[Kind],
    batch: int,
    weights: str,
    device: Device,
    devices: int,
    token: int,
    link: Link | None,
) -> Phase:
    linear = 2 * batch * (spec.linear_parameters + spec.vocabulary * spec.hidden)
    share = [(kind.layers, -(-kind.read // devices)) for kind in kinds]
    reads = sum(layers * read for layers, read in share)
    attention = read_operations(spec) * spec.heads * batch * reads
    moved = read_bytes(spec, weights, batch) + batch * token * reads
    found = _phase(spec, linear, attention, moved, device)
    if link is None:
        return found
    # As attnspan.planner.ring.decode_cost: partial outputs and log-sum-exps, in fp32.
    part = batch * spec.heads * (spec.head_dim + 1) * 4 * (devices - 1)
    return replace(
        found,
        seconds=found.seconds + spec.layers * (link.latency + part / link.bandwidth),
    )


def _phase(
    spec: ModelSpec, linear: int, attention: int, moved: int, device: Device, steps: int = 1
) -> Phase:
    """Computing and moving go on side by side; each layer's attention takes a call's time more."""
    computing = linear / device.linear + attention / device.forward
    seconds = max(computing, moved / device.memory_bandwidth) + steps * spec.layers * device.call
    return Phase(linear, attention, moved, seconds, device.linear / device.memory_bandwidth)
