"""`attnspan doctor`: how far a model sees, and what may be dropped."""

from __future__ import annotations

import click

doctor = click.Command("doctor")
