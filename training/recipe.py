"""The numbers of a run, and how a command takes them."""

import argparse
import sysconfig
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from training.model import Shape


@dataclass(frozen=True)
class Common:
    """What the bundled model's run and those of its variants have alike."""

    width: int = 256
    layers: int = 10
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 736
    length: int = 1024
    batch: int = 64
    learning_rate: float = 4e-3
    warmup: int = 400
    decay: float = 0.3
    weight_decay: float = 0.1
    english_share: float = 0.12

    @property
    def shape(self) -> Shape:
        return Shape(self.width, self.layers, self.heads, self.kv_heads, self.ffn, self.length)


Recipe = TypeVar("Recipe", bound=Common)


def command(name: str, doc: str | None, recipe: type[Common]) -> argparse.ArgumentParser:
    """A parser of the texts, the folder to write, the device, and an option for each number."""
    parser = argparse.ArgumentParser(prog=f"python -m training.{name}", description=doc)
    installed = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "stdlib")]
    parser.add_argument("--python", type=Path, nargs="+", default=installed)
    parser.add_argument("--english", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--max-files", type=int)
    for field in fields(recipe):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)
    return parser


def given_by(arguments: argparse.Namespace, recipe: type[Recipe]) -> Recipe:
    """The recipe that the options of `command` give."""
    values: dict[str, Any] = {
        field.name: getattr(arguments, field.name) for field in fields(recipe)
    }
    return recipe(**values)
