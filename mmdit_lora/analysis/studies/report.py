"""`study.md`: what was found, in words and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdit_lora.visual.page import code_markdown, escape_markdown


def markdown(results: Mapping[str, Any]) -> str:
    """The page of `study.json`."""
    asked = results["asked"]
    lines = [
        f"# {results['title']}",
        "",
        code_markdown(results["command"]) if results["command"] else "",
        "",
        f"Base {escape_markdown(', '.join(asked['bases']) or asked['config']['base'])}; seeds {', '.join(map(str, asked['seeds']))}; "
        f"{asked['config']['train']['max_steps']} steps of {asked['config']['train']['batch_size']}; at most "
        f"{asked['images']} held-out layouts are painted. All runs together took {results['wall_seconds'] / 60:.0f} minutes "
        f"({_machine(results['machine'])}).",
        "",
        "![plot](study.png)",
        "",
        "## Verdict",
        "",
    ]
    for verdict in results["verdicts"]:
        lines += [f"- **{verdict['result']}**: {escape_markdown(verdict['claim'])}"]
        lines += [
            f"  - {escape_markdown(name.replace('_', ' '))}: {escape_markdown(_value(value))}"
            for name, value in verdict["figures"].items()
        ]
        lines += [f"  - rule, written before the first run: {escape_markdown(verdict['rule'])}"]
    lines += ["", "## Settings", "", *_table(results["settings"])]
    lines += [
        "",
        "In brackets 95 % intervals over seeds and held-out layouts. mIoU is the mean over layouts of the mean IoU of "
        "their boxes; gain and change are its differences from the base, paired by layout; loss is the held-out loss minus the base's, below 0 is better. Memory is the peak of the "
        "training above the loaded libraries, the largest of the setting's runs; size is that of what was trained, in fp32. "
        "An end of an interval that is open lies beyond what was tried.",
    ]
    if results["learning_rates"]["tried"]:
        lines += [
            "",
            "## Learning rates",
            "",
            f"The one with the lowest held-out loss after a third of the steps, on seed {results['learning_rates']['seed']}, "
            "which is none of the study's own.",
            "",
            "| for | tried: loss minus the base's | chosen |",
            "| --- | --- | --- |",
        ]
        for kind, tried in results["learning_rates"]["tried"].items():
            tries = ", ".join(f"{one['learning_rate']:g}: {_tried(one['loss_minus_base'])}" for one in tried)
            lines.append(f"| {escape_markdown(kind)} | {tries} | {results['learning_rates']['chosen'][kind]:g} |")
    else:
        lines += ["", "No learning rate was searched for (`--quick`)."]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    old = [key for key in ("old_miou", "old_loss_minus_base") if any(row[key] is not None for row in rows)]
    names_of_old = {"old_miou": ["old mIoU", "change"], "old_loss_minus_base": ["old loss"]}
    names = ["setting", "trained", "rate", "mIoU", "gain", *(name for key in old for name in names_of_old[key])]
    names += ["loss", "seconds", "memory", "size"]
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 1)]
    for row in rows:
        trained = row["learning_rate"] is not None
        cells = [
            escape_markdown(row["setting"]),
            f"{row['trainable_params']:,}" if trained else "",
            f"{row['learning_rate']:g}" if trained else "",
            _mean(row["miou"]),
            _cell(row["gain"]),
            *([_mean(row["old_miou"]), _cell(row["old_change"])] if "old_miou" in old else []),
            *([_cell(row["old_loss_minus_base"])] if "old_loss_minus_base" in old else []),
            _cell(row["loss_minus_base"]),
            f"{row['train_seconds']:.0f}" if trained else "",
            f"{row['peak_memory'] / 2**20:,.0f} MiB" if trained else "",
            f"{row['bytes'] / 1024:,.0f} KiB" if trained else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _tried(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def _mean(interval: Mapping[str, float] | None) -> str:
    return "" if interval is None else f"{interval['mean']:.3f}"


def _cell(interval: Mapping[str, float] | None) -> str:
    return "" if interval is None else "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**interval)


def _value(value: Any) -> str:
    if value is None:
        return "not reached or not measured"
    if isinstance(value, Mapping):
        if value.keys() == {"mean", "low", "high"}:
            return f"{_number(value['mean'])} [{_number(value['low'])}, {_number(value['high'])}]"
        return "; ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    return _number(value) if isinstance(value, float | int) else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return "open"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.4f}"


def _machine(found: Mapping[str, Any]) -> str:
    return found["gpu"] or f"{found['cores']} cores, {found['threads']} threads a run"
