"""`study.md`: verdicts in words, and a table of settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from mmdit_lora.visual.pages import render


def markdown(results: Mapping[str, Any]) -> str:
    """The page of `study.json`."""
    asked, rates, machine = results["asked"], results["learning_rates"], results["machine"]
    return render(
        "study.md",
        title=results["title"],
        command=results["command"],
        about=(
            f"Base {', '.join(asked['bases']) or asked['config']['base']}; seeds {', '.join(map(str, asked['seeds']))}; "
            f"{asked['config']['train']['max_steps']} steps of {asked['config']['train']['batch_size']}; at most "
            f"{asked['images']} held-out layouts are sampled. All runs together took {results['wall_seconds'] / 60:.0f} minutes "
            f"({machine['gpu'] or '{cores} cores, {threads} threads a run'.format(**machine)})."
        ),
        verdicts=[
            verdict | {"figures": {name: _value(value) for name, value in verdict["figures"].items()}}
            for verdict in results["verdicts"]
        ],
        settings=_settings(results["settings"]),
        scan_seed=rates["seed"],
        rates=[
            [kind, ", ".join(_tried(**one) for one in tried), f"{rates['chosen'][kind]:g}"]
            for kind, tried in rates["tried"].items()
        ],
    )


def _settings(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows; a column of the old domain where any setting has it."""
    columns = {
        "setting": lambda row: row["setting"],
        "trained": lambda row: _if(row, "{trainable_params:,}"),
        "rate": lambda row: _if(row, "{learning_rate:g}"),
        "mIoU": lambda row: _mean(row["miou"]),
        "gain": lambda row: _interval(row["gain"]),
        "old mIoU": lambda row: _mean(row["old_miou"]),
        "change": lambda row: _interval(row["old_change"]),
        "old loss": lambda row: _interval(row["old_loss_minus_base"]),
        "loss": lambda row: _interval(row["loss_minus_base"]),
        "seconds": lambda row: _if(row, "{train_seconds:.0f}"),
        "memory": lambda row: _if(row, "{mib:,.0f} MiB", mib=(row["peak_memory"] or 0) / 2**20),
        "size": lambda row: _if(row, "{kib:,.0f} KiB", kib=row["bytes"] / 1024),
    }
    missing = {"old mIoU", "change"} if all(row["old_miou"] is None for row in rows) else set()
    missing |= {"old loss"} if all(row["old_loss_minus_base"] is None for row in rows) else set()
    head = [name for name in columns if name not in missing]
    return head, [[columns[name](row) for name in head] for row in rows]


def _if(row: Mapping[str, Any], form: str, **more: float) -> str:
    """Of a setting that was trained."""
    return "" if row["learning_rate"] is None else form.format(**row, **more)


def _tried(learning_rate: float, loss_minus_base: float | None) -> str:
    return f"{learning_rate:g}: " + ("diverged" if loss_minus_base is None else f"{loss_minus_base:.4f}")


def _mean(interval: Mapping[str, float] | None) -> str:
    return "" if interval is None else f"{interval['mean']:.3f}"


def _interval(interval: Mapping[str, float] | None) -> str:
    return Markup("" if interval is None else "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**interval))


def _value(value: Any) -> str:
    if value is None:
        return "not reached or not measured"
    if isinstance(value, Mapping):
        if value.keys() == {"mean", "low", "high"}:
            return Markup(f"{_number(value['mean'])} [{_number(value['low'])}, {_number(value['high'])}]")
        return "; ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    return _number(value) if isinstance(value, float | int) else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return "open"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.4f}"
