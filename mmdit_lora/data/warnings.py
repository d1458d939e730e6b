"""What a reader warns of: a line for the first few of each kind, and one line for how many more there are."""

from __future__ import annotations

from mmdit_lora.boxes import EdgeCount

_SHOWN = 3


class Warnings:
    """Collects what disagreed in a set and what was taken instead, by kind."""

    def __init__(self) -> None:
        self._by_kind: dict[str, list[str]] = {}
        self._notes: list[str] = []
        self.edges = EdgeCount()

    def add(self, kind: str, location: str, what: str) -> None:
        """Note one place.

        Args:
            kind: what such places are, in the plural, e.g. "annotations that state no size".
            location: the file.
            what: what was found there, and what was taken instead.
        """
        self._by_kind.setdefault(kind, []).append(f"{location}: {what}")

    def note(self, line: str) -> None:
        """Note something of the set as a whole."""
        self._notes.append(line)

    def clipped(self, by: float, location: str) -> None:
        """Count a box that left its image by this share of the side and was clipped."""
        self.edges.add(by, location)

    def lines(self) -> list[str]:
        """What is of the whole set; the first places of each kind, then a sum of the others; one line of clipped boxes."""
        result = list(self._notes)
        for kind, places in self._by_kind.items():
            result += places[:_SHOWN]
            if len(places) > _SHOWN:
                result.append(f"{len(places) - _SHOWN} more {kind} ({len(places)} in all)")
        if self.edges.message:
            result.append(self.edges.message)
        return result
