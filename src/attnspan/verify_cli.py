"""`attnspan verify`: a plan beside real allocations."""

from __future__ import annotations

import typer

verify = typer.Typer()
