"""What a reader warns of: a line for the first few of each kind, and one line for how many more there are."""

from __future__ import annotations

_SHOWN = 3


class Warnings:
    """Collects what disagreed in a set and what was taken instead, by kind."""

    def __init__(self) -> None:
        self._by_kind: dict[str, list[str]] = {}

    def add(self, kind: str, where: str, what: str) -> None:
        """Note one place.

        Args:
            kind: what such places are, in the plural, e.g. "annotations that state no size".
            where: the file.
            what: what was found there, and what was taken instead.
        """
        self._by_kind.setdefault(kind, []).append(f"{where}: {what}")

    def lines(self) -> list[str]:
        """The first places of each kind, then a sum of the others of that kind."""
        result = []
        for kind, places in self._by_kind.items():
            result += places[:_SHOWN]
            if len(places) > _SHOWN:
                result.append(f"{len(places) - _SHOWN} more {kind} ({len(places)} in all)")
        return result
