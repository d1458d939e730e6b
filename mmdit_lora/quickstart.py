"""The whole way in a few minutes: data of a new domain, an adapter, pictures before and after, figures, an export."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmdit_lora.config import load_config
from mmdit_lora.data.records import read_dataset
from mmdit_lora.data.shapes import DOMAINS, write_dataset
from mmdit_lora.errors import InputError
from mmdit_lora.evaluate.draw import before_after, save_png
from mmdit_lora.evaluate.sides import Evaluation, evaluate
from mmdit_lora.export import Target, export_adapter
from mmdit_lora.files import write_json
from mmdit_lora.pipelines import LayoutPipeline, PaintSettings
from mmdit_lora.training.trainer import train

CONFIG = "configs/quickstart.yaml"
NEW, OLD = "page", "basic"  # the new domain, and one that the base was trained on
TRAIN_PICTURES, HELD_OUT_PICTURES = 2000, 96
TRAIN_SEED, HELD_OUT_SEED, OLD_SEED = 11, 12, 13
EXPORTS: tuple[Target, ...] = ("peft", "merged")
SHOWN = 6  # pictures in the figure: the first ones, not the best ones
_MARK = "quickstart.yaml"
_OWN = ("data", "adapter", "peft", "merged", "samples", "checkpoints", "tensorboard", "wandb")

Tell = Callable[[str, int, int, dict[str, float]], None]  # phase, done, of how many, scalars


def quickstart(out: str | Path, *, config_path: str | Path | None = None, tell: Tell | None = None) -> dict[str, Any]:
    """Train on `NEW`, judge on held-out layouts of it and of `OLD`, and write `out`.

    Args:
        out: gets `report.json`, `before_after.png`, `adapter/`, `merged/` and the data.
        tell: called as phases go on.

    Returns:
        What `report.json` holds: fidelity of `base`, `adapter`, `ground_truth` and `shuffled`, the same under `old_domain`,
        sizes, `export_max_abs_diff`, seconds per phase.

    Raises:
        InputError: `out` holds something else than an earlier quickstart, or the embedded base is not found.
    """
    out, tell = Path(out), tell or (lambda *_: None)
    config_path = Path(config_path) if config_path is not None else find_file(CONFIG)
    _clear(out)
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        tell(name, 0, 0, {})
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 2)

    data = {"train": out / "data" / "train", "held_out": out / "data" / "held_out", "old": out / "data" / "old_domain"}
    overrides = [f"data.path={data['train']}", f"data.validation={data['held_out']}", f"output_dir={out}"]
    config = load_config(config_path, overrides)
    config = config.model_copy(update={"base": str(find_file(config.base))})
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).write_text(config.to_yaml(), encoding="utf-8")
    with phase("data"):
        write_dataset(data["train"], DOMAINS[NEW], count=TRAIN_PICTURES, seed=TRAIN_SEED)
        write_dataset(data["held_out"], DOMAINS[NEW], count=HELD_OUT_PICTURES, seed=HELD_OUT_SEED)
        write_dataset(data["old"], DOMAINS[OLD], count=HELD_OUT_PICTURES, seed=OLD_SEED)
    with phase("train"):
        steps = config.train.max_steps
        result = train(config, on_progress=lambda step, scalars: tell("train", step, steps, scalars))
    with phase("evaluate"):
        new = _evaluate(result.pipe, data["held_out"], "new domain", tell)
        old = _evaluate(result.pipe, data["old"], "old domain", tell)
    with phase("figure"):
        save_png(_figure(new), out / "before_after.png")
    with phase("export"):
        exports = [export_adapter(out / "adapter", to=to, out=out / to, base=config.base) for to in EXPORTS]
    report = {
        **{key: value for key, value in new.to_dict().items() if key != "by_boxes"},
        "old_domain": {name: side.fidelity for name, side in old.sides.items()},
        "held_out_loss": result.report["held_out_loss"],
        "trainable_params": result.report["trainable_params"],
        "total_params": result.report["total_params"],
        "steps": result.report["steps"],
        "export_max_abs_diff": max(export.max_abs_diff for export in exports),
        "adapter_bytes": (out / "adapter" / "adapter_model.safetensors").stat().st_size,
        "seconds": seconds | {"total": round(sum(seconds.values()), 2)},
    }
    write_json(out / "report.json", report)
    return report


def find_file(name: str) -> Path:
    """`name` under the current directory, or beside the package in a source checkout.

    Raises:
        InputError: it is in neither.
    """
    for root in (Path(), Path(__file__).resolve().parent.parent):
        if (root / name).exists():
            return root / name
    raise InputError(
        "is not here", where=name, cure="run the quickstart in a clone of the repository: it holds the embedded base"
    )


def _evaluate(pipe: LayoutPipeline, folder: Path, name: str, tell: Tell) -> Evaluation:
    pipe.transformer.eval()
    records = read_dataset(folder)
    return evaluate(
        pipe,
        records,
        PaintSettings(),
        seed=0,
        on_progress=lambda side, done: tell(f"paint {name}, {side}", done, len(records), {}),
    )


def _figure(evaluation: Evaluation) -> Any:
    base, adapter = evaluation.sides["base"], evaluation.sides["adapter"]
    return before_after(
        evaluation.layouts[:SHOWN],
        base.pictures[:SHOWN],
        adapter.pictures[:SHOWN],
        title="Held-out layouts, same noise, before and after",
        scores=(base.picture_ious[:SHOWN], adapter.picture_ious[:SHOWN]),
    )


def _clear(out: Path) -> None:
    """Make room for a new quickstart where an earlier one is; refuse anything else."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / _MARK).is_file()):
        raise InputError("exists and is not an earlier quickstart", where=f"--out {out}", cure="give another folder")
    for name in _OWN:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("report.json", "before_after.png", "config.yaml"):
        (out / name).unlink(missing_ok=True)
