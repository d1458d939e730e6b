"""The quickstart: data of a new domain, an adapter, images before and after, figures and an export in a few minutes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmdit_lora.cli.run_display import ShowProgress
from mmdit_lora.config.loading import Config, load_config
from mmdit_lora.data.records import read_dataset
from mmdit_lora.data.shapes import DOMAINS, write_dataset
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.evaluate import Evaluation, evaluate
from mmdit_lora.export import Target
from mmdit_lora.export.export import export_adapter
from mmdit_lora.files import read_text, write_json, write_text
from mmdit_lora.json_files import read_cached
from mmdit_lora.outputs import open_folder
from mmdit_lora.pipelines import LayoutPipeline, SamplingConfig
from mmdit_lora.training.callbacks import OnProgress
from mmdit_lora.training.run_dir import WRITTEN
from mmdit_lora.training.stopping import Interrupted
from mmdit_lora.training.trainer import train
from mmdit_lora.visual import before_after, save_png

CONFIG = "configs/quickstart.yaml"
NEW, OLD = "page", "basic"  # the new domain, and one that the base was trained on
TRAIN_IMAGES, HELD_OUT_IMAGES = 2000, 96
TRAIN_SEED, HELD_OUT_SEED, OLD_SEED = 11, 12, 13
EXPORTS: tuple[Target, ...] = ("peft", "merged")
EXPORTS_FOLDERS = tuple(f"{to}/" for to in EXPORTS)
SHOWN = 6  # images in the figure: the first ones, not the best ones
_MARK, REPORT = "quickstart.yaml", "report.json"
_WRITTEN = (_MARK, "before_after.png", "data/", "images/", *EXPORTS_FOLDERS, *WRITTEN)


def quickstart(
    out: str | Path, *, config_path: str | Path | None = None, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Train on `NEW`, evaluate on held-out layouts of it and of `OLD`, and write `out`. A stopped quickstart goes on;
    a finished one returns its report again.

    Args:
        out: gets `report.json`, `before_after.png`, `adapter/`, `merged/` and the data.
        on_progress: called as phases go on.

    Returns:
        What `report.json` holds: fidelity of `base`, `adapter`, `ground_truth` and `shuffled`, the same under `old_domain`,
        sizes, `export_max_abs_diff`, seconds per phase.

    Raises:
        InputError: `out` holds something else than this quickstart.
    """
    out, on_progress = Path(out), on_progress or (lambda *_: None)
    data = {"train": out / "data" / "train", "held_out": out / "data" / "held_out", "old": out / "data" / "old_domain"}
    overrides = [f"data.path={data['train']}", f"data.validation={data['held_out']}", f"output_dir={out}"]
    config = load_config(config_path or CONFIG, overrides)
    with open_folder(out, verb="quickstart", names=_WRITTEN, inputs={"base": config.base}):
        if (found := _finished(out, config)) is not None:
            return found
        write_text(out / _MARK, config.to_yaml())
        return _run(out, config, data, on_progress)


def _finished(out: Path, config: Config) -> dict[str, Any] | None:
    """The report of an earlier start that came to its end.

    Raises:
        InputError: an earlier start had another config.
    """
    if (out / _MARK).exists() and read_text(out / _MARK) != config.to_yaml():
        raise InputError("holds a quickstart of another config", location=str(out), hint="give another --out")
    report = read_cached(out / REPORT, dict)
    return report if report and "export_max_abs_diff" in report else None  # otherwise it is that of the training


def _run(out: Path, config: Config, data: dict[str, Path], on_progress: OnProgress) -> dict[str, Any]:
    """All phases; what an earlier start finished is not done again."""
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        on_progress(name, 0, 0, {})
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 2)

    with phase("data"):
        for folder, domain, count, seed in (
            (data["train"], NEW, TRAIN_IMAGES, TRAIN_SEED),
            (data["held_out"], NEW, HELD_OUT_IMAGES, HELD_OUT_SEED),
            (data["old"], OLD, HELD_OUT_IMAGES, OLD_SEED),
        ):
            if not folder.exists():  # whole or absent
                write_dataset(folder, DOMAINS[domain], count=count, seed=seed, verb="quickstart")
    with phase("train"):
        try:
            result = train(config, resume=True, callbacks=[ShowProgress(on_progress, config.train.max_steps)])
        except Interrupted as error:
            raise Interrupted(error.signal_name, error.step, again="the same call") from None
    with phase("evaluate"):
        new = _evaluate(result.pipe, data["held_out"], out / "images" / "new", "new domain", on_progress)
        old = _evaluate(result.pipe, data["old"], out / "images" / "old", "old domain", on_progress)
    with phase("figure"):
        save_png(_figure(new), out / "before_after.png")
    with phase("export"):
        exports = [export_adapter(out / "adapter", to=to, out=out / to, base=config.base) for to in EXPORTS]
    report = {
        **{key: value for key, value in new.to_dict().items() if key != "by_boxes"},
        "old_domain": {name: one.fidelity for name, one in old.conditions.items()},
        "held_out_loss": result.report["held_out_loss"],
        "trainable_params": result.report["trainable_params"],
        "total_params": result.report["total_params"],
        "steps": result.report["steps"],
        "export_max_abs_diff": max(export.max_abs_diff for export in exports),
        "adapter_bytes": (out / "adapter" / "adapter_model.safetensors").stat().st_size,
        "seconds": seconds | {"total": round(sum(seconds.values()), 2)},
    }
    write_json(out / REPORT, report)
    return report


def _evaluate(pipe: LayoutPipeline, folder: Path, images: Path, name: str, on_progress: OnProgress) -> Evaluation:
    pipe.transformer.eval()
    records = read_dataset(folder)
    return evaluate(
        pipe,
        records,
        SamplingConfig(),
        seed=0,
        cache_dir=images,
        on_progress=lambda condition, done: on_progress(f"sample {name}, {condition}", done, len(records), {}),
    )


def _figure(evaluation: Evaluation) -> Any:
    base, adapter = evaluation.conditions["base"], evaluation.conditions["adapter"]
    return before_after(
        evaluation.layouts[:SHOWN],
        base.images[:SHOWN],
        adapter.images[:SHOWN],
        title="Held-out layouts, same noise, before and after",
        scores=(base.image_ious[:SHOWN], adapter.image_ious[:SHOWN]),
    )
