"""Reading ahead on threads, for stores where a read waits for the network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


class Prefetch(Generic[In, Out]):
    """The results of `load` for each item, in the items' order, up to `ahead` of them being loaded before they are asked for.

    What `load` raises is raised where its result would have come; what follows can still be read. Leaving the iteration
    cancels what has not begun.

    Args:
        items: may be endless; not more than `ahead` of them are taken in advance.
        load: called on threads.
        ahead: results that are kept or under way. threads: at most so many calls at once.
    """

    def __init__(self, items: Iterable[In], load: Callable[[In], Out], *, ahead: int = 16, threads: int = 4) -> None:
        if ahead < 1 or threads < 1:
            raise ValueError(f"ahead is {ahead} and threads {threads}; both are at least 1")
        self._items, self._load, self._ahead = iter(items), load, ahead
        self._pool = ThreadPoolExecutor(min(threads, ahead), thread_name_prefix="prefetch")
        self._flying: deque[Future[Out]] = deque()

    def __iter__(self) -> Iterator[Out]:
        return self

    def __next__(self) -> Out:
        self._fill()
        if not self._flying:
            self.close()
            raise StopIteration
        return self._flying.popleft().result()

    def __enter__(self) -> Prefetch[In, Out]:
        self._fill()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what has not begun, and wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._flying.clear()
        self._items = iter(())

    def _fill(self) -> None:
        while len(self._flying) < self._ahead:
            try:
                item = next(self._items)
            except StopIteration:
                return
            self._flying.append(self._pool.submit(self._load, item))
