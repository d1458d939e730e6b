"""A study from start to verdict. What is written down before the first run: the claims, and the rules that decide them."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from typing import Any

import torch

from mmdit_lora import __version__
from mmdit_lora.analysis.studies.budget import BudgetStudy
from mmdit_lora.analysis.studies.intrinsic import IntrinsicDimensionStudy
from mmdit_lora.analysis.studies.methods import MethodsStudy
from mmdit_lora.analysis.studies.rank import RankStudy
from mmdit_lora.analysis.studies.report import markdown
from mmdit_lora.analysis.studies.runs import read_figures, run_all, scan_rates
from mmdit_lora.analysis.studies.setup import Scan, Setup, Study
from mmdit_lora.analysis.studies.statistics import plain
from mmdit_lora.analysis.studies.table import Table
from mmdit_lora.data.records import read_dataset
from mmdit_lora.errors import InputError
from mmdit_lora.files import write_json, write_text
from mmdit_lora.json_files import read_object
from mmdit_lora.outputs import check_open_folder, open_folder
from mmdit_lora.training.callbacks import OnProgress
from mmdit_lora.training.load_base import open_encoders
from mmdit_lora.training.setup import read_data

_BY_IMAGE = ("ious", "old_ious", "loss_minus_base", "old_losses")  # these stay in the runs' own files
PLAN, RESULTS, PLOT, PAGE, VERDICT = "plan.json", "study.json", "study.png", "study.md", "verdict.json"
_WRITTEN = (PLAN, RESULTS, PLOT, PAGE, VERDICT, "runs/", "cache/")


STUDIES: dict[str, Study] = {
    "intrinsic-dimension": IntrinsicDimensionStudy(),
    "budget": BudgetStudy(),
    "rank": RankStudy(),
    "methods": MethodsStudy(),
}


def run_study(
    setup: Setup, *, command: str = "", on_progress: OnProgress | None = None, isolate: bool = True
) -> dict[str, Any]:
    """Run what is not yet there of a study, and write `plan.json`, `study.json`, `study.png`, `study.md`, `verdict.json`.

    Args:
        command: how it was started, for the record.
        on_progress: called after every run. isolate: see `run_all`.

    Returns:
        What `study.json` holds.

    Raises:
        InputError: the folder holds something else, or a run is not possible. Stopped: start it again, it goes on.
    """
    study, out = STUDIES[setup.name], setup.out
    check_open_folder(out, verb="study", names=_WRITTEN)
    scans = _check(setup, study)
    inputs = {"base": setup.config.base, "data.path": setup.config.data.path, "--old": setup.old}
    with open_folder(out, verb="study", names=_WRITTEN, inputs=inputs):
        _claim_folder(setup, study)
        rates, tried = scan_rates(setup, scans, on_progress, isolate=isolate)
        runs = run_all(setup, study.arms(setup, rates), on_progress, isolate=isolate)
        table = Table(runs)
        decided, extra = study.conclude(setup, table)
        study.draw(setup, table, extra, out / PLOT)
        kept = [{key: value for key, value in run.items() if key not in _BY_IMAGE} for run in runs]
        scanned = [read_figures(path)["seconds"] for path in (out / "runs").glob("scan*/figures.json")]
        results = plain(
            {
                "study": setup.name,
                "title": study.title,
                "command": command,
                "asked": setup.to_dict(),
                "machine": machine(),
                "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "wall_seconds": round(sum(run["seconds"] for run in runs) + sum(scanned), 1),
                "learning_rates": {"chosen": rates, "tried": tried, "seed": setup.scan_seed},
                "verdicts": [one.to_dict() for one in decided],
                "settings": table.rows(),
                "runs": kept,
                **extra,
            }
        )
        write_json(out / RESULTS, results)
        write_json(out / VERDICT, {"study": setup.name, "claims": results["verdicts"]})
        write_text(out / PAGE, markdown(results))
        return results


def machine() -> dict[str, Any]:
    """What the figures were made on and with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: version(name) for name in ("torch", "diffusers", "peft", "accelerate", "transformers")}
    return {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": {"mmdit_lora": __version__, **versions},
    }


def _check(setup: Setup, study: Study) -> list[Scan]:
    """Check what can be checked before the first run; the scans of the study.

    Raises:
        InputError: nothing is held out, a base or data set cannot be opened, or a run's config is not valid.
    """
    if not read_data(setup.config).held_out:
        raise InputError(
            "holds nothing out", location="data", hint="give data.validation or a data.validation_share above 0"
        )
    if setup.old is not None:
        read_dataset(setup.old)
    for base in setup.bases or (setup.config.base,):
        open_encoders(setup.config.model_copy(update={"base": base}), torch.float32, texts=False)
    scans = study.scans(setup)
    for scan in scans:
        scan.arm(setup, scan.rates[0]).config(setup)
    return scans


def _claim_folder(setup: Setup, study: Study) -> None:
    """The plan, written once; later starts must be of the same.

    Raises:
        InputError: the folder holds another study.
    """
    path = setup.out / PLAN
    claims = [{"claim": claim.text, "rule": claim.rule} for claim in study.claims(setup)]
    wanted = json.loads(json.dumps(setup.to_dict() | {"claims": claims}))
    if path.is_file():
        if (
            there := read_object(path, what="plan of a study", hint="give another --out, or remove this one")
        ) != wanted:
            keys = [key for key in wanted if there.get(key) != wanted[key]]
            raise InputError(
                f"holds a study that was asked for otherwise (other: {', '.join(keys)})",
                location=str(setup.out),
                hint="give another --out, or start it again as it was",
            )
        return
    write_json(path, wanted)
