"""`attnspan plan` and `article`: what a context costs."""

from __future__ import annotations

import typer

plan = typer.Typer()
