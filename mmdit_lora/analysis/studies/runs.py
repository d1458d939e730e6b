"""Runs of a study, one after another: finished ones are read, an interrupted one goes on."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from mmdit_lora.analysis.studies.setup import Arm, Scan, Setup
from mmdit_lora.analysis.studies.worker import FIGURES, run_alone, run_arm
from mmdit_lora.errors import InputError
from mmdit_lora.json_files import read_object
from mmdit_lora.training.callbacks import OnProgress

Figures = dict[str, Any]

_EXTENSIONS, _FACTOR = 2, 3.0  # how often, and by how much, a scan goes on beyond a best rate at its end


def run_all(
    setup: Setup, arms: Sequence[Arm], on_progress: OnProgress | None = None, *, isolate: bool = True
) -> list[Figures]:
    """The figures of every arm, in order.

    Args:
        isolate: each run in a process of its own, forked from one that has loaded the libraries and nothing else.

    Raises:
        InputError, Stopped: see `train`.
    """
    results = []
    for number, arm in enumerate(arms):
        path = setup.out / "runs" / arm.folder / FIGURES
        if not path.is_file() and isolate:
            with _pool() as pool:
                pool.submit(run_alone, setup, arm).result()
        elif not path.is_file():
            run_arm(setup, arm)
        figures = read_figures(path)
        results.append(figures)
        if on_progress is not None:
            on_progress(f"{arm.setting}, seed {arm.seed}", number + 1, len(arms), figures)
    return results


def read_figures(path: Path) -> Figures:
    """What `run_arm` wrote."""
    return read_object(path, what="file of figures", hint="remove it: the run is done again")


def scan_rates(
    setup: Setup, scans: Sequence[Scan], on_progress: OnProgress | None = None, *, isolate: bool = True
) -> tuple[dict[str, float], dict[str, list[dict[str, float]]]]:
    """The learning rate of each kind with the lowest held-out loss, and all that were tried.

    A best rate at an end of its scan is followed by up to two more beyond it. With `quick` nothing is tried: the middle one
    is taken.

    Raises:
        InputError: a kind diverges at all of its rates. See also `run_all`.
    """
    chosen: dict[str, float] = {}
    tried: dict[str, list[dict[str, float]]] = {}
    for scan in scans:
        if setup.quick:
            chosen[scan.kind] = scan.rates[len(scan.rates) // 2]
            continue
        losses: dict[float, float] = {}
        rates = list(scan.rates)
        for _ in range(1 + _EXTENSIONS):
            new = [rate for rate in rates if rate not in losses]
            for rate, figures in zip(
                new, run_all(setup, [scan.arm(setup, rate) for rate in new], on_progress, isolate=isolate), strict=True
            ):
                differences = figures["loss_minus_base"]
                losses[rate] = math.inf if differences is None else sum(differences) / len(differences)
            best = min(losses, key=lambda rate: (losses[rate], rate))
            if best == max(rates):
                rates.append(float(f"{best * _FACTOR:.3g}"))
            elif best == min(rates):
                rates.insert(0, float(f"{best / _FACTOR:.3g}"))
            else:
                break
        if not math.isfinite(losses[best]):
            raise InputError(
                f"diverges for {scan.kind} at all of {', '.join(f'{rate:g}' for rate in sorted(losses))}",
                location="train.learning_rate",
                hint="give a lower one: the rates that are tried are around it",
            )
        chosen[scan.kind] = best
        tried[scan.kind] = [{"learning_rate": rate, "loss_minus_base": losses[rate]} for rate in sorted(losses)]
    return chosen, tried


def _pool() -> ProcessPoolExecutor:
    """One process for one run. Not `max_tasks_per_child=1`, by which a pool may hang (python/cpython issue 115634)."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run_alone.__module__])  # loaded once, for all runs
    return ProcessPoolExecutor(max_workers=1, mp_context=context)
