"""Load a causal language model from a folder: offline, safetensors only, no remote code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attnspan.models import bundled
from attnspan.planner.configs import from_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attnspan.models.stretch import Stretch

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.pkl")
_MADE_UP = 4 * 2**30  # bytes of random weights
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")


def load(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
    stretch: Stretch | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in eval mode and its tokenizer, from `"bundled"` or a folder of safetensors and JSON.

    Nothing is downloaded and no code of the folder runs: a folder that asks for either is refused.
    Weights that don't fill the model are refused too, for transformers would make up the rest.

    Args:
        name_or_path: `"bundled"` (`attnspan.models.bundled`) or a folder as `save_pretrained`
            writes it.
        device: where the model goes; None is CUDA where there is a device, else the CPU.
        dtype: of the weights; "auto" is the stored dtype; None is that on CUDA, and float32 on a
            CPU, where half precision may be slow.
        stretch: how its rotary positions are interpolated, if they are; it isn't trained further.

    Raises:
        FileNotFoundError: the folder, its config or its weights are not there.
        ValueError: the folder can't be used; one sentence says why.
    """
    folder = bundled.path() if str(name_or_path) == "bundled" else Path(name_or_path)
    _check(folder)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = _device(device)
    stored = place.type == "cuda"
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (
            Exception
        ) as error:  # transformers and tokenizers raise many kinds, Exception itself too
            raise _refusal(folder, "its tokenizer can't be loaded", error) from error
        if not tokenizer.is_fast or not len(tokenizer):
            raise ValueError(
                f"model {folder}: its tokenizer gives no character offsets; "
                "a tokenizer.json is needed"
            )
        given = {} if stretch is None else {"config": _stretched(folder, stretch)}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                **given,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype or ("auto" if stored else torch.float32),
                output_loading_info=True,
            )
        except Exception as error:  # a damaged file, an unknown family, a missing quantiser, ...
            raise _refusal(folder, "the model can't be loaded", error) from error
    model, report = loaded
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:
        raise ValueError(
            f"model {folder}: its weights don't fill the model: {len(absent)} tensors are missing "
            f"or of another shape, {absent[0]} among them"
        )
    return model.to(place).eval(), tokenizer


def made_up(config: str | Path, device: str | torch.device | None = None) -> PreTrainedModel:
    """The model of a config's file, of the folder that holds a `config.json`, or of `"bundled"`,
    with random weights.

    It is in eval mode, in bfloat16 on CUDA and float32 on a CPU; no weights, tokenizer or code are
    read.

    Raises:
        ValueError: it is no config of a family that the planner knows, asks for remote code, or its
            weights would take more than 4 GiB; one sentence says which.
    """
    path = bundled.path() if str(config) == "bundled" else Path(config)
    if not path.exists():
        raise ValueError(
            f"model {path}: there is no such file; a config.json under any name, the folder of one "
            "or bundled is allowed"
        )
    file = path / "config.json" if path.is_dir() else path
    spec = from_config(file)
    if asked := _remote_code(_json(file, path)):
        raise ValueError(
            f"model {path}: {file.name} asks for remote code ({asked}), which is never run here"
        )

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = _device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    size = spec.parameters * dtype.itemsize
    if size > _MADE_UP:
        raise ValueError(
            f"model {path}: random weights would take {size} bytes; up to {_MADE_UP} are allowed"
        )
    with _quiet():
        try:
            parts = AutoConfig.from_pretrained(
                str(file), local_files_only=True, trust_remote_code=False
            )
            with place:
                model: Any = AutoModelForCausalLM.from_config(parts, dtype=dtype)
        except Exception as error:  # configs fail in as many ways as there are families
            raise _refusal(path, "the model can't be made", error) from error
    return model.eval()


def _stretched(folder: Path, stretch: Stretch) -> Any:
    """The folder's config with its rotary positions interpolated."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # configs fail in as many ways as there are families
        raise _refusal(folder, "its config can't be loaded", error) from error
    try:
        stretch.apply(config.get_text_config(decoder=True))
    except ValueError as error:
        raise ValueError(f"model {folder}: {error}") from None
    return config


def _check(folder: Path) -> None:
    """Refuses what can be refused before transformers is imported."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"model {folder}: there is no such folder; bundled or the folder of a model is allowed"
        )
    config = _json(folder / "config.json", folder)
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        asked = _remote_code(_json(path, folder)) if path.exists() else None
        if asked:
            raise ValueError(
                f"model {folder}: {name} asks for remote code ({asked}), which is never run here"
            )
    if "model_type" not in config:
        raise ValueError(f"model {folder}: config.json names no model_type")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for kind in _PICKLED for path in folder.glob(kind))
        if pickled:
            raise ValueError(
                f"model {folder}: holds pickled weights only ({pickled[0]}), which are never "
                "unpickled; save them as safetensors"
            )
        raise FileNotFoundError(f"model {folder}: there are no weights (*.safetensors) in it")
    if not any(path for kind in _TOKENIZERS for path in folder.glob(kind)):
        raise FileNotFoundError(f"model {folder}: there is no tokenizer (tokenizer.json) in it")


def _json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"model {folder}: there is no {path.name} in it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(folder, f"{path.name} can't be read", error) from None
    if not isinstance(value, dict):
        raise ValueError(f"model {folder}: {path.name} holds no JSON object")
    return value


def _remote_code(value: Any) -> str | None:
    """The entry that would fetch or run code: `auto_map`, or an implementation from a hub."""
    if isinstance(value, list):
        return next(filter(None, map(_remote_code, value)), None)
    if not isinstance(value, dict):
        return None
    for key, entry in value.items():
        if key == "auto_map" and entry:
            return key
        if "implementation" in key and "/" in json.dumps(entry):
            return key
    return next(filter(None, map(_remote_code, value.values())), None)


def _device(device: str | torch.device | None) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # torch raises AssertionError where it was built without CUDA.
        raise ValueError(
            f"device {str(device)!r} can't be used here; cpu or cuda is usual"
        ) from error
    if place.type == "meta":
        raise ValueError("device 'meta' holds no numbers; cpu or cuda is usual")
    return place


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' log lines and bars off standard error, and undoes that."""
    from transformers.utils import logging

    silent = 50  # the standard library's logging.CRITICAL
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(silent)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _refusal(folder: Path, what: str, error: Exception) -> ValueError:
    """One line of an error that may hold many: the reason may stand in any of them."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"model {folder}: {what}: {reason.rstrip('.')[:500]}")
