"""What a look before a run found: one line a check, and whether the run may start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mmdit_lora.errors import InputError

CheckState = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Args:
        name: of the check; several lines may have the same.
        state: "failed" keeps the run from starting.
        found: what was found, with its figures.
        cure: how to mend it; None where nothing is to be mended.
        seconds: that it took; 0 for further lines of a check.
    """

    name: str
    state: CheckState
    found: str
    cure: str | None = None
    seconds: float = 0.0


@dataclass
class Preflight:
    """All checks, in the order in which they were made."""

    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """Those that keep the run from starting."""
        return [check for check in self.checks if check.state == "failed"]

    @property
    def seconds(self) -> float:
        """That all of them took."""
        return sum(check.seconds for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"ok": not self.failed, "seconds": self.seconds, "checks": [asdict(check) for check in self.checks]}

    def refuse_failed(self) -> None:
        """Raises `InputError` with the first check that failed, and how many more did."""
        if not self.failed:
            return
        first, more = self.failed[0], len(self.failed) - 1
        others = f"; {more} more failed: {', '.join(check.name for check in self.failed[1:])}" if more else ""
        raise InputError(first.found + others, where=f"preflight, {first.name}", cure=first.cure)

    @contextmanager
    def timed(self, name: str) -> Iterator[Lines]:
        """Within it, lines of the check `name` are added; the first gets the time."""
        before, lines = time.perf_counter(), Lines(name)
        yield lines
        passed = time.perf_counter() - before
        for number, (state, found, cure) in enumerate(lines.added):
            self.checks.append(Check(name, state, found, cure, 0.0 if number else passed))


class Lines:
    """The lines of one check, while it is made."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.added: list[tuple[CheckState, str, str | None]] = []

    def ok(self, found: str) -> None:
        self.added.append(("ok", found, None))

    def warn(self, found: str, cure: str | None = None) -> None:
        self.added.append(("warning", found, cure))

    def fail(self, found: str, cure: str) -> None:
        self.added.append(("failed", found, cure))
