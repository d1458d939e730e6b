"""The verbs that work with models: train, sample, evaluate, export, quickstart, verify."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add this file's verbs to the app."""
