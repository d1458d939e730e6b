"""A run in somebody else's program: what it sets for the whole process is afterwards what it was."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

_ACCELERATE = (PartialState, AcceleratorState, GradientState)
# (object, attribute) of PyTorch's switches for kernels.
_SWITCHES = (
    (torch.backends.cudnn, "enabled"),
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "deterministic"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_tf32"),
)


@contextmanager
def isolated() -> Iterator[None]:
    """Within it, Accelerate's state is a fresh one. Afterwards these are as before: Accelerate's state, the generators of
    PyTorch, NumPy and Python, PyTorch's default dtype and kernel switches, os.environ, warning filters, and the levels and
    handlers of loggers. (Signal handlers: see `stopping.caught_signals`.)
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        stack.enter_context(torch.random.fork_rng(devices))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        for state in _ACCELERATE:  # instances keep the mapping that they were made with
            stack.callback(setattr, state, "_shared_state", state._shared_state)
            state._shared_state = {}
        for module, name in _SWITCHES:
            stack.callback(setattr, module, name, getattr(module, name))
        stack.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.callback(setattr, sys, "excepthook", sys.excepthook)
        stack.callback(_set_environment, dict(os.environ))
        known = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
        for logger in known:
            stack.callback(_set_logger, logger, logger.level, list(logger.handlers), logger.propagate)
        yield


def _set_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _set_logger(logger: logging.Logger, level: int, handlers: list[logging.Handler], propagate: bool) -> None:
    logger.setLevel(level)
    logger.handlers[:], logger.propagate = handlers, propagate
