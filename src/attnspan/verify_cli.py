"""`attnspan verify`: a plan beside real allocations."""

from __future__ import annotations

import click

verify = click.Command("verify")
