"""A limit for what would otherwise wait for ever."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """What waits for a FIFO would wait for ever."""

    def late(*_: object) -> None:
        pytest.fail(f"not done in {seconds} s")  # no Exception: what is under test must not catch it

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
