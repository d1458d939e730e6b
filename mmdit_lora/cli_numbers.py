"""Options that are numbers: each with the range that `mmdit_lora.ranges` or its verb states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from mmdit_lora.ranges import Range


def number(within: Range, name: str, *, help: str, then: Callable[[Any], object] | None = None, **options: Any) -> Any:
    """A `typer.Option` whose value, or each of whose two values, lies in `within`; the help shows the range.

    Args:
        then: checks a value whose numbers are in the range.

    Typer's own `min` and `max` let NaN through, and their refusals say neither the value nor the whole range.
    """

    def checked(value: Any) -> Any:
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None:
                within.check(each, name)
        if then is not None and value is not None:
            then(value)
        return value

    checked.within = within  # type: ignore[attr-defined]  # by which tests find it
    return typer.Option(name, help=f"{help} [{str(within).partition('number ')[2]}]", callback=checked, **options)
