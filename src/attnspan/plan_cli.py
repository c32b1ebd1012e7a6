"""`attnspan plan` and `article`: what a context costs."""

from __future__ import annotations

import click

plan = click.Command("plan")
