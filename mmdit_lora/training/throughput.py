"""Where a run's time goes: rate, share of data, FLOPs, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


class Throughput:
    """Seconds by phase since the last `read`, and what the steps computed."""

    def __init__(self) -> None:
        self._flops: dict[Shape, int] = {}
        self._clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within as `name`'s; that of "pause" belongs to no step and is left out of all rates."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - before

    def count(self, shape: Shape, once: Callable[[], object]) -> None:
        """Add the FLOPs of a batch.

        Args:
            shape: of the batch; batches of one shape are taken to compute the same.
            once: forward and backward of it, of which nothing stays: called for each new shape. (Not the step itself: under
                PyTorch's counter, attention runs by another kernel, whose last bits differ.)
        """
        if shape not in self._flops:
            with self.phase("pause"), FlopCounterMode(display=False) as counter:
                once()
            self._flops[shape] = counter.get_total_flops()
        self._done += self._flops[shape]

    def read(self, samples: int) -> dict[str, float]:
        """What `samples` took since the last call, and begin anew.

        Returns:
            samples_per_s; share_data, share_other: of the time, neither forward, backward nor optimizer; tflops: per second
            and process, absent where not counted; memory_gb: peak of the device, or of the process on a CPU.
        """
        passed = time.perf_counter() - self._since - self._seconds.get("pause", 0.0)
        compute = self._seconds.get("compute", 0.0) + self._seconds.get("optimizer", 0.0)
        data = self._seconds.get("data", 0.0)
        out = {
            "samples_per_s": samples / passed,
            "share_data": data / passed,
            "share_other": max(passed - compute - data, 0.0) / passed,
            "memory_gb": peak_memory() / 1e9,
        }
        if self._done:
            out["tflops"] = self._done / passed / 1e12
        self._clear()
        return out

    def _clear(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()
        self._done = 0


def peak_memory() -> int:
    """Bytes: the most that was ever allocated on the GPU, or that this process ever had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
