"""The one exception for wrong input, so that every entry point reports it in the same way."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


class InputError(ValueError):
    """The user's input is wrong. The command line prints it in one message, without a traceback, and exits with 2.

    Args:
        what: what is wrong, with the value that is wrong in it.
        location: the place: a file, a file and line, a key of the config. Given by the innermost reader that knows it;
            outer readers add theirs with `at`.
        hint: how to correct it, as an instruction.
    """

    def __init__(self, what: str, *, location: str | None = None, hint: str | None = None) -> None:
        # Messages echo keys and values of files, which may be megabytes long.
        self.what = clip(what, 900)
        self.location = None if location is None else clip(location, 300)
        self.hint = None if hint is None else clip(hint, 700)
        super().__init__(self.what)

    def at(self, location: str) -> InputError:
        """The same error, `location` put before its own (a reader adds the file and line that a parser does not know)."""
        return type(self)(
            self.what, location=f"{location}: {self.location}" if self.location else location, hint=self.hint
        )

    def __str__(self) -> str:
        message = f"{self.location}: {self.what}" if self.location else self.what
        return f"{message}\n  hint: {self.hint}" if self.hint else message


class Stopped(Exception):
    """A run ended before its last step, with its state safe. The command line prints it in one message and exits with
    `exit_code`."""

    exit_code = 1


class NonFiniteError(Stopped):
    """Latents or images hold NaN or infinity, so none of them is written.

    Args:
        bad: numbers of those that do, from 0. count: how many there are.
        what: "images" or "latents". dtype: what they were computed in. step: the first sampling step, from 1, after which
            the latents of one were not finite, if known. left: how many more were to be sampled.
    """

    def __init__(
        self, bad: Sequence[int], count: int, *, what: str, dtype: str, step: int | None = None, left: int = 0
    ) -> None:
        self.bad, self.count, self.what, self.dtype, self.step, self.left = list(bad), count, what, dtype, step, left
        super().__init__()

    def change(self, **changes: Any) -> NonFiniteError:
        """The same error with other fields, by those who know more."""
        return NonFiniteError(**{**vars(self), **changes})

    def __str__(self) -> str:
        numbers = "number" if len(self.bad) == 1 else "numbers"
        since = "" if self.step is None else f", the latents from step {self.step} on"
        left = f"; {self.left} more were not sampled" if self.left else ""
        return (
            f"{len(self.bad)} of {self.count} {self.what} hold NaN or infinity: {numbers} {listed(self.bad)} "
            f"({self.dtype}{since}){left}; none of them is kept\n  hint: take smaller weights of the adapters, a lower "
            "guidance or layout scale; check the adapter with `mmdit-lora verify`; sample in fp32"
        )


def clip(text: object, limit: int = 200) -> str:
    """`str(text)` for a message, at most `limit` characters: the middle of a longer one is left out."""
    full = str(text)
    if len(full) <= limit:
        return full
    gap = f" ... ({len(full):,} characters) ... "
    head = max(limit - len(gap), 0) * 2 // 3
    tail = max(limit - len(gap) - head, 0)
    return full[:head] + gap + full[len(full) - tail :]


class _Bounded(reprlib.Repr):
    """Reads only the first parts of a value: a YAML file of a few lines may stand for 9 ** 10 of them."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 8
        self.maxstring = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 4096 else f"<int of {x.bit_length()} bits>"


_BOUNDED = _Bounded()


def shown(value: object) -> str:
    """A short `repr(value)` for a message; the full text of a huge value is never built."""
    return clip(_BOUNDED.repr(value))


def listed(names: Iterable[object]) -> str:
    """The first eight names, each clipped, and whether there are more, for messages."""
    names = list(names)
    return ", ".join(clip(name, 100) for name in names[:8]) + (", ..." if len(names) > 8 else "")


def counted(faults: Mapping[str, Collection[object]]) -> str:
    """Kind of fault -> names, as "2 missing: a, b; 1 unexpected: c"; empty where there is none."""
    return "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in faults.items() if names)


def several(errors: Sequence[InputError], *, location: str, hint: str | None = None) -> InputError:
    """One error of many: the first twenty, a line each, as far as a message goes, and how many there are.

    Args:
        location: the file or folder that they are of; their own locations are shortened by it. hint: for all of them.
    """
    if len(errors) == 1:
        (error,) = errors
        what = f"{error.what}; {hint}" if hint else error.what
        return InputError(what, location=error.location, hint=error.hint)
    beside = f"{os.path.dirname(location)}/" if os.path.dirname(location) else location + "/"  # noqa: PTH120 - it may be a URL
    lines: list[str] = []
    for error in errors[:20]:
        first = str(error).splitlines()[0].replace(f"{location}/", "").replace(beside, "")
        line = f"- {clip(first, 180)}"
        if sum(map(len, lines)) + len(line) > 900 - len(hint or ""):
            break
        lines.append(line)
    count = f"{len(errors)} errors" + (f", the first {len(lines)} of which are" if len(lines) < len(errors) else "")
    hints = [error.hint for error in errors if error.hint]
    return InputError(
        "\n".join([count, *lines, *([hint] if hint else [])]), location=location, hint=hints[0] if hints else None
    )


def unknown_key(key: str, known: Iterable[str], *, location: str | None = None) -> InputError:
    """An `InputError` for a key that does not exist, naming the nearest one that does."""
    names = list(known)
    near = difflib.get_close_matches(str(key)[:100], names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
    return InputError(f"unknown key {shown(key)}", location=location, hint=hint)
