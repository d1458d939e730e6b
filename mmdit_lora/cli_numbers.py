"""Options that are numbers: each with the range that `mmdit_lora.ranges` or its verb states."""

from __future__ import annotations

from typing import Any

import typer

from mmdit_lora.ranges import Range


def number(within: Range, name: str, *, help: str, **options: Any) -> Any:
    """A `typer.Option` whose value, or each of whose two values, lies in `within`; the help shows the range.

    Typer's own `min` and `max` let NaN through, and their refusals say neither the value nor the whole range.
    """

    def checked(value: Any) -> Any:
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None:
                within.check(each, name)
        return value

    checked.within = within  # type: ignore[attr-defined]  # by which tests find it
    shown = f"{'above ' if within.above else ''}{within.low:,.15g} to {within.high:,.15g}"
    return typer.Option(name, help=f"{help} [{shown}]", callback=checked, **options)
