"""One step of a stream as a CUDA graph: captured once, replayed for each token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from attnspan.cache.clock import Clock
from attnspan.models.anatomy import text_config
from attnspan.models.cache import Cache
from attnspan.models.interface import restore_forward

# One row makes products of matrices products with a vector, for which Inductor then writes kernels
# of its own, joined with what stands before and after them.
_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}


class StepGraph:
    """A model's step of one token for each row, with its cache, as a CUDA graph.

    The graph holds everything from the token to the next one: embedding, layers, the cache's
    rolling buffers, logits and their largest. Where the stream stands is a number on the device,
    which the graph itself counts on, so a step costs the host one call and the same at any place of
    the stream. The cache counts along: prompts may go through the model in between, and snapshots
    are as ever.

    The policies are `Window`, `SinkWindow`, `KeepAll` and heads with these, each with any storage,
    once the sinks (and for int4 the means) are in. The others decide on the host what stays, so
    their steps can't be captured. A cache that keeps everything is captured anew when it
    has filled what was allotted, which is half as much again each time.

    What the graph holds is the model's own forward. With `compiled` its layers go through
    torch.compile first, which joins norms, rotations, residuals and, for one row, the products
    themselves; the first step then takes the minute that compiling takes.

    Args:
        model: on one CUDA device, inside `attnspan.attach`, for as long as steps are taken. Its
            weights must stay where they are.
        cache: of that model, with the stream's first tokens in it.
        compiled: whether the model's layers go through torch.compile.

    Attributes:
        token: int64 `(batch, 1)` on the device, the largest logit's index after each step.

    Raises:
        ValueError: when the step can't be captured; one sentence says why.
        TypeError: `cache` is another library's.

    Memory that the graph needs while it runs isn't in `cache.nbytes`.
    """

    def __init__(self, model: nn.Module, cache: Cache, *, compiled: bool = False) -> None:
        if not isinstance(cache, Cache):
            raise TypeError(f"cache is a {type(cache).__name__}; an attnspan.Cache is allowed")
        self.model, self.cache, self.compiled = model, cache, compiled
        if (lack := self.lacks()) is not None:
            raise ValueError(f"this step can't be captured in a CUDA graph: {lack}")
        device = cache.device
        self.batch = cache.batch_size
        with torch.inference_mode(False):
            heads = max(layer.spec.num_kv_heads for layer in cache.anatomy.layers)
            counters = torch.zeros(self.batch * heads, dtype=torch.int32, device=device)
            self.clock = Clock(torch.zeros(1, dtype=torch.int64, device=device), counters)
            self.token = torch.zeros(self.batch, 1, dtype=torch.int64, device=device)
        self._graph: tuple[torch.cuda.CUDAGraph, Tensor] | None = None  # and the logits it leaves
        self._captured: list[Tensor] = []
        self._frequencies: list[Tensor] = []  # which the graph reads, and a cache might let go
        self._at = -1  # the stream position that the device holds
        self._fed = False

    def lacks(self) -> str | None:
        """Why no step can be taken now, as the end of a sentence; None: it can."""
        if self.cache.model is not self.model:
            return "the cache was made for another model"
        if "_attnspan" not in self.model.__dict__:
            return "the model is not attached: steps belong inside `with attnspan.attach(model):`"
        if self.cache.device.type != "cuda":
            return f"the model is on {self.cache.device}, and CUDA graphs need a CUDA device"
        return self.cache.lacks_step()

    @torch.no_grad()
    def __call__(self, token: int | Tensor | None = None) -> Tensor:
        """Takes in a token for each row, and gives the logits after it.

        Args:
            token: an id, or ids `(batch,)` or `(batch, 1)`; None: those with the largest logits
                after the step before.

        Returns:
            `(batch, vocabulary)` in the model's dtype, overwritten by the next step. The host
            doesn't wait for it.

        Raises:
            ValueError: when no step can be taken, or `token` is none of these.
        """
        self._feed(token)
        graph, logits = self._make_ready()
        # Until both have counted, where the device stands is in doubt, and is set anew.
        at, self._at = self._at, -1
        graph.replay()
        self.cache.count_step()
        self._at = at + 1
        return logits

    @torch.no_grad()
    def greedy(self, count: int) -> Tensor:
        """The next `count` tokens of each row, each the likeliest, int64 `(batch, count)`.

        The first of them is the one with the largest logit after the step before.
        """
        drawn = torch.empty(self.batch, count, dtype=torch.int64, device=self.token.device)
        for i in range(count):
            drawn[:, i : i + 1] = self.token
            self()
        return drawn

    def _feed(self, token: int | Tensor | None) -> None:
        if token is None:
            if not self._fed:
                raise ValueError("token is None; the first step takes an id for each row")
            return
        if isinstance(token, Tensor):
            if token.numel() != self.batch or token.dtype not in (torch.int64, torch.int32):
                raise ValueError(
                    f"token is {token.dtype} {tuple(token.shape)}; ids ({self.batch},) are allowed"
                )
            self.token.copy_(token.reshape(self.batch, 1))
        else:
            count = self.cache.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < count:
                raise ValueError(f"token is {token!r}; an id from 0 to {count - 1} is allowed")
            self.token.fill_(token)
        self._fed = True

    def _make_ready(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of what the cache now holds, captured if need be, with the clock set."""
        if (lack := self.lacks()) is not None:
            raise ValueError(f"no step can be taken: {lack}")
        if self.cache.batch_size != self.batch:
            raise ValueError(
                f"the cache has {self.cache.batch_size} rows; this graph was made for {self.batch}"
            )
        lanes = [lane for cache in self.cache.caches for lane in cache.lanes]
        for lane in lanes:
            lane.make_room()
        if self.cache.tokens_seen != self._at:
            self._at = self.cache.tokens_seen
            self.clock.position.fill_(self._at)
        held = [x for lane in lanes for x in lane.tensors().values()]
        same = len(held) == len(self._captured) and all(
            ours is theirs for ours, theirs in zip(held, self._captured, strict=True)
        )
        if self._graph is None or not same:
            # Gives the old one's memory back before the new one takes its own.
            self._graph, self._captured = None, []
            self._graph = self._capture()
            self._captured = held
            ropes = {lane.spec.rope for lane in lanes if lane.spec.rope is not None}
            self._frequencies = [rope.frequencies_on(self.token.device) for rope in ropes]
        return self._graph

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        device = self.token.device
        own, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        # A step that isn't counted can be taken again, so it may run before it is captured: what
        # compiles or allocates at its first run has then done so.
        stream.wait_stream(own)
        try:
            with _compiled(_layers(self.model)) if self.compiled else nullcontext():
                with torch.cuda.stream(stream):
                    for _ in range(3):
                        self._run()
                own.wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    if self.clock.counters is not None:
                        self.clock.counters.zero_()  # whatever a step that died left in them
                    logits = self._run()
                    self.token.copy_(logits.argmax(-1, keepdim=True))
                    self.clock.position.add_(1)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                "the model's step can't be captured in a CUDA graph "
                f"({str(error).splitlines()[0]}); uncaptured steps go through the model itself"
            ) from error
        return graph, logits

    def _run(self) -> Tensor:
        """A step at the clock's position, `(batch, vocabulary)`."""
        model: Any = self.model
        with self.cache.clocked(self.clock):
            # Logits, or a headless model's last state.
            return model(input_ids=self.token, past_key_values=self.cache, use_cache=True)[0][:, -1]


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers."""
    count = text_config(model).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []


@contextmanager
def _compiled(layers: list[nn.Module], backend: Any = "inductor") -> Iterator[None]:
    """For the block's length, layers run through torch.compile, one compilation for all alike."""
    before = [layer.__dict__.get("forward") for layer in layers]
    # Layers differ in their number alone, which is then an input and not a constant of each; what
    # would be compiled anew for every layer all the same raises instead of running slowly.
    settings = torch._dynamo.config.patch(
        allow_unspec_int_on_nn_module=True, fail_on_recompile_limit_hit=True
    )
    try:
        with settings:
            for layer in layers:
                layer.__dict__["forward"] = torch.compile(
                    layer.forward,
                    backend=backend,
                    options=_OPTIONS if backend == "inductor" else None,
                )
            yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            restore_forward(layer, forward)
