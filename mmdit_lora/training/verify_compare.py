"""Two runs compared: step by step, then by what they left. What differs first is told in plain words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mmdit_lora import json_files
from mmdit_lora.training.checkpoint import WEIGHTS, Checkpoint, checkpoints
from mmdit_lora.training.loop import StepRecord
from mmdit_lora.training.output import CHECKPOINTS

Row = dict[str, Any]

# In the order in which one follows from the other; what a difference says about its cause.
_FIELDS = {
    "samples": "the order of the data depends on more than seed and position",
    "times": "what is drawn for a sample depends on more than seed and position",
    "losses": "weights, moving parts of the base or what is drawn for the samples are not what they were",
    "loss": "the mean is taken in another way",
    "learning_rate": "the schedule did not go on where it was",
    "grad_norm": "the backward pass is not the same",
}
# Of the state: what may differ between equal runs.
_FREE = {"seconds", "tracker_run_id"}


def row_of(record: StepRecord) -> Row:
    """A step as JSON can hold it, without loss: what Python writes of a float reads back as the same one."""
    return {
        "step": record.step,
        "samples": list(record.samples),
        "times": record.times.tolist(),
        "losses": record.losses.tolist(),
        "loss": record.loss,
        "learning_rate": record.learning_rate,
        "grad_norm": record.grad_norm,
    }


def read_rows(path: Path) -> list[Row]:
    """Rows, one a line; a last line that a kill cut short is left out."""
    return json_files.read_rows(path, what="list of steps")


def first_difference(one: Iterable[Row], two: Iterable[Row]) -> str | None:
    """What differs in the first step that differs, None where none does.

    Args:
        one: every step once. two: of the other run, in any order; a step that was done again after a kill is there again.
    """
    expected = {row["step"]: row for row in one}
    seen: set[int] = set()
    for row in sorted(two, key=lambda row: row["step"]):
        seen.add(row["step"])
        if row["step"] not in expected:
            return f"step {row['step']}: the undisturbed run ended before it"
        if (found := _difference(expected[row["step"]], row)) is not None:
            return found
    missing = sorted(expected.keys() - seen)
    return f"step {missing[0]}: only the undisturbed run came to it" if missing else None


def _difference(one: Row, two: Row) -> str | None:
    for name, meaning in _FIELDS.items():
        a, b = one[name], two[name]
        if a == b:
            continue
        what = f"the {name.replace('_', ' ')}"
        if isinstance(a, list):
            pairs = [(x, y, n) for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
            if name != "samples" and pairs:
                place = _short([one["samples"][pairs[0][2]]])
                return f"step {one['step']}: {what} differ, at {place}: {pairs[0][0]!r} against {pairs[0][1]!r} ({meaning})"
            a, b = [x for x, _, _ in pairs] or a, [y for _, y, _ in pairs] or b
            return f"step {one['step']}: {what} differ: {_short(a)} against {_short(b)} ({meaning})"
        return f"step {one['step']}: {what} differs: {a!r} against {b!r} ({meaning})"
    return None


def _short(samples: Sequence[str]) -> str:
    """The first four, by file name and line."""
    names = [Path(str(sample)).name for sample in samples]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def end_difference(one: Path, two: Path) -> str | None:
    """What differs in two output folders: the last checkpoints' weights, optimizer, average and state, then the result."""
    first, second = _last(one), _last(two)
    if first.step != second.step:
        return f"the last checkpoint: step {first.step} against step {second.step}"
    states = first.state(), second.state()
    files = sorted(states[0]["sha256"].keys() | states[1]["sha256"].keys(), key=lambda name: name != WEIGHTS)
    for name in files:
        if found := _file_difference(first.folder / name, second.folder / name, name):
            return f"the checkpoint of step {first.step}: {found}"
    for key in ("schedule_step", "scaler", "fingerprints"):
        if states[0][key] != states[1][key]:
            return f"the checkpoint of step {first.step}: {key} is {states[0][key]!r} against {states[1][key]!r}"
    for key in (key for key in states[0]["run"] if key not in _FREE):
        a, b = states[0]["run"][key], states[1]["run"][key]
        if a != b:
            return f"the checkpoint of step {first.step}: {key} is {a!r} against {b!r}"
    names = [path.relative_to(one) for path in result_files(one)]
    if names != [path.relative_to(two) for path in result_files(two)]:
        return "the result has other files"
    for path in names:
        if found := _file_difference(one / path, two / path, str(path)):
            return found
    return None


def result_files(folder: Path) -> list[Path]:
    """The weights that a run left: of its adapter, or of its base's transformer."""
    found = [*folder.glob("adapter/*.safetensors"), *folder.glob("base/transformer/*.safetensors")]
    return sorted(found)


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of what safetensors files hold. (Not of their bytes: the order of a header's entries is drawn anew each time.)"""
    whole = hashlib.sha256()
    for path in paths:
        tensors, header = _content(path)
        whole.update(json.dumps(header, sort_keys=True).encode())
        for name in sorted(tensors):
            tensor = tensors[name].contiguous()
            whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping


def _last(folder: Path) -> Checkpoint:
    return checkpoints(folder / CHECKPOINTS)[-1]


def _file_difference(one: Path, two: Path, name: str) -> str | None:
    if not (one.is_file() and two.is_file()):
        return f"{name} is only in one of them"
    (a, header), (b, other_header) = _content(one), _content(two)
    if a.keys() != b.keys():
        return f"{name} holds other tensors: {', '.join(sorted(a.keys() ^ b.keys())[:4])}"
    bad = [key for key in a if not _same_bits(a, b, key)]
    if not bad:
        return None if header == other_header else f"{name} has another header"
    most = max((a[key].double() - b[key].double()).abs().max().item() for key in bad)
    return f"{name} differs in {len(bad)} of {len(a)} tensors, first {bad[0]}, by at most {most:.3g}"


def _same_bits(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor], key: str) -> bool:
    a, b = one[key], two[key]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
