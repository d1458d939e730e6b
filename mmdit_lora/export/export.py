"""An adapter for other tools. Every export is used in a fresh process as its user would, and compared before it counts."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdit_lora.errors import InputError
from mmdit_lora.export import Target, check_target
from mmdit_lora.export.creatilayout import write_creatilayout_adapter, write_creatilayout_stream
from mmdit_lora.export.diffusers import write_diffusers
from mmdit_lora.export.kohya import is_kohya_export, write_kohya
from mmdit_lora.export.read_back import BARE, answers, open_transformer, outputs
from mmdit_lora.files import atomic_file
from mmdit_lora.lora import (
    StoredAdapter,
    load_adapter,
    merge_adapter,
    public_header,
    read_adapter_config,
    read_card,
    save_adapter,
)
from mmdit_lora.lora.known_bases import base_of, remember_base, remember_stream, stream_of
from mmdit_lora.models.creatilayout import SLOTS, variant_of_model
from mmdit_lora.models.families import stored_transformer
from mmdit_lora.models.generic_stream import StreamModel
from mmdit_lora.models.stream_files import save_layout_stream
from mmdit_lora.outputs import check_new_file, new_folder, refuse_inputs
from mmdit_lora.pipelines import LayoutPipeline, load_pipeline, quiet

TOLERANCE = 1e-4  # of the velocity
IMAGE_TOLERANCE = 2e-3  # half a grey level of [0, 1]: sampling adds up the differences of its steps
_NOTES = {
    "kohya": "mmdit-lora reads this file (load_lora_weights, sample --adapter); sd-scripts and ComfyUI have no layout stream, "
    "so none of its keys means anything to them",
    "merged": "mmdit-lora opens this base; stock diffusers and ComfyUI have no layout stream, and would drop it",
    "creatilayout": f"CreatiLayout's own code fills up to {SLOTS} boxes and attends to the filling; this base does not, so "
    "images sampled there differ from those sampled here",
}


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far its outputs in a fresh process are from those of base + adapter.

    Args:
        max_abs_diff: largest difference of the predicted velocity, over two random inputs with three boxes each.
        max_image_diff: largest difference of a sampled image, in [0, 1]; None if nothing was sampled.
        effect: largest difference that the adapter itself makes to the velocity (of a stream alone: the layout); 0 would mean
            that it does nothing.
        note: what the other tool does otherwise, if anything.
    """

    to: str
    out: str
    bytes: int
    max_abs_diff: float
    effect: float
    note: str | None = None
    max_image_diff: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_adapter(
    adapter: str | Path,
    to: Target,
    out: str | Path,
    *,
    base: str | None = None,
    stream: str | Path | None = None,
    merge: bool = False,
) -> ExportReport:
    """Write `out`, load it in a fresh process with the loader of its format, and compare the velocity for random inputs and an
    image sampled twice with one seed.

    Dropout is written as 0, so that no loader leaves it on; the header keeps the trained value.

    Args:
        to: "peft" a PEFT folder; "diffusers" a folder for `pipe.load_lora_weights`; "kohya" one .safetensors file in the
            names of kohya-ss/sd-scripts; "creatilayout" a folder under CreatiLayout's names, for its `load_lora_adapter`;
            "merged" a whole base with the adapter in its weights (fp32), or a whole generic stream.
        base: folder or hub id; None = the one that the adapter names.
        stream: folder of a generic layout stream; None = the one that the adapter names, if any.
        merge: "creatilayout" only: the whole layout stream with the adapter in its weights.

    Raises:
        InputError: `adapter` is not an adapter, does not fit the base or the format, or `out` exists and is not an export.
        RuntimeError: the written files do not give the same outputs; they are removed again.
    """
    out, inputs = Path(out), {"ADAPTER": adapter, "--base": base, "--stream": stream}
    check_target(to, out, merge=merge, inputs=inputs)
    if to == "kohya":
        check_new_file(out, verb="export", inputs=inputs, is_own=is_kohya_export)
    if to == "creatilayout" and (Path(adapter) / "transformer").is_dir():
        return _export_stream(str(adapter), out)
    base, stream = base or base_of(adapter), stream or stream_of(adapter)
    refuse_inputs([out], {"--base": base, "--stream": stream}, verb="export")
    if to == "creatilayout" and stream is not None:
        raise InputError("is for built-in streams, and this adapter is of a generic one", location=f"--to {to}")
    if to == "creatilayout":  # known from its config, before any weight is opened
        transformer, stored_config = stored_transformer(base)
        with torch.device("meta"):
            variant_of_model(cast(Any, transformer).from_config(stored_config))
    with atomic_file(out) if to == "kohya" else new_folder(out, verb="export") as temporary:
        pipe, stored = _open(adapter, base, stream)
        config = pipe.transformer.peft_config["default"]
        header = public_header({"base": base, "lora_dropout": config.lora_dropout, **stored.header})
        config.lora_dropout = 0.0
        note = _note(to, pipe.transformer)
        expected, effect = _reference(pipe)
        if merge:
            write_creatilayout_stream(merge_adapter(pipe.transformer, in_place=True), temporary)
        else:
            _write(to, pipe, temporary, adapter, header, base)
        del pipe  # the fresh process needs the memory
        gc.collect()
        differences = _compare("creatilayout stream" if merge else to, temporary, base, expected, stream)
    return ExportReport(to, str(out), _bytes(out), differences[0], effect, note, differences[1])


def verify_adapter(adapter: str | Path, *, base: str | None = None, stream: str | Path | None = None) -> dict[str, Any]:
    """Load an adapter strictly on its base, and again in a fresh process by the loader of its format (a PEFT folder: by PEFT
    alone); compare the outputs.

    Returns:
        base, form, fingerprint, parameters, `effect` (largest change of the velocity that it makes), `max_abs_diff` and
        `max_image_diff`.

    Raises:
        InputError: it is not an adapter, is damaged, is for another base or has no effect; or PEFT cannot load it by its config.
    """
    base, stream = base or base_of(adapter), stream or stream_of(adapter)
    pipe, stored = _open(adapter, base, stream)
    expected, effect = _reference(pipe)
    count = sum(p.numel() for name, p in pipe.transformer.named_parameters() if "lora_" in name)
    del pipe
    gc.collect()
    if effect == 0:
        raise InputError("changes nothing: its weights are all zero", location=str(adapter), hint="train it for longer")
    # PEFT would try a file's regular expressions on every module, and one that backtracks takes minutes.
    form = "ours" if stored.form == "peft" and not _states_names(stored) else stored.form
    try:
        path = stored.path.parent if stored.form == "peft" else stored.path
        differences = _compare(form, path, base, expected, stream)
    except RuntimeError as error:
        raise InputError(f"another loader gives other outputs: {error}", location=str(adapter)) from None
    named: dict[str, Any] = {key: stored.header[key] for key in ("fingerprint", "version") if key in stored.header}
    return {
        "adapter": str(adapter),
        "base": base,
        "form": stored.form,
        **named,
        "parameters": count,
        "effect": effect,
        "max_abs_diff": differences[0],
        "max_image_diff": differences[1],
    }


def _states_names(stored: StoredAdapter) -> bool:
    """Whether the config is read as it is stored: it has no regular expressions."""
    config = read_adapter_config(stored.path.parent)
    keys = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")
    return all(getattr(config, key) == getattr(stored.config, key) for key in keys)


def _open(adapter: str | Path, base: str, stream: str | Path | None) -> tuple[LayoutPipeline, StoredAdapter]:
    pipe = load_pipeline(base, stream=stream)
    stored = load_adapter(pipe.transformer, adapter)
    remember_base(stored.header.get("fingerprint"), base)
    remember_stream(stored.header.get("fingerprint"), stream)
    return pipe, stored


def _export_stream(base: str, out: Path) -> ExportReport:
    """A base's own layout stream under CreatiLayout's names."""
    model = open_transformer(base).eval()
    expected = outputs(model)
    effect = (expected - outputs(model, layout_scale=0.0)).abs().max().item()
    with new_folder(out, verb="export") as temporary:
        write_creatilayout_stream(model, temporary)
        difference, _ = _compare("creatilayout stream", temporary, base, {"velocity": expected})
    return ExportReport("creatilayout", str(out), _bytes(out), difference, effect, _note("creatilayout", model))


def _note(to: Target, model: Any) -> str | None:
    if isinstance(model, StreamModel):
        return _NOTES[to] if to == "kohya" else None
    same_as_theirs = model.config.layout_slots == SLOTS and not model.config.mask_padding
    return None if to == "creatilayout" and same_as_theirs else _NOTES.get(to)


def _write(
    to: Target, pipe: LayoutPipeline, path: Path, adapter: str | Path, header: dict[str, Any], base: str
) -> None:
    if to == "peft":
        save_adapter(pipe.transformer, path, metadata=header, card=read_card(adapter))
    elif to == "merged":
        pipe.transformer = merge_adapter(pipe.transformer, in_place=True)
        if isinstance(pipe.transformer, StreamModel):
            save_layout_stream(pipe.transformer, path, base=base)
            return
        with quiet():
            pipe.save_pretrained(path)
    else:
        write = {"diffusers": write_diffusers, "kohya": write_kohya, "creatilayout": write_creatilayout_adapter}[to]
        write(pipe.transformer, path, header)


def _reference(pipe: LayoutPipeline) -> tuple[dict[str, Tensor], float]:
    """The outputs of base + adapter, and how much the adapter changes the velocity."""
    expected = answers(pipe, twice=False)
    pipe.transformer.disable_lora()
    effect = (expected["velocity"] - outputs(pipe.transformer)).abs().max().item()
    pipe.transformer.enable_lora()
    return expected, effect


def _read_back(to: str, written: Path, base: str, stream: str | Path | None) -> dict[str, Tensor]:
    """The outputs in a process that has only the files."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answers.safetensors"
        command = [sys.executable, "-m", "mmdit_lora.export.read_back", to, str(written), str(answer), base]
        command += [] if stream is None else [str(stream)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"the export cannot be read back: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
            )
        return {name: value.clone() for name, value in load_file(answer).items()}


def _compare(
    to: str, written: Path, base: str, expected: dict[str, Tensor], stream: str | Path | None = None
) -> tuple[float, float | None]:
    """Largest differences of velocity and image to those of a fresh process, which computes them twice.

    Raises:
        RuntimeError: they are too large, or the second outputs are not the first, as with dropout left on.
    """
    found = _read_back(to, written, base, stream)
    for name in expected:
        if not torch.equal(found[name], found[f"{name} again"]):
            raise RuntimeError(f"the export gives another {name} when it is asked again; nothing was written")
    velocities = [found[name] for name in ("velocity", BARE) if name in found]
    velocity = max((each - expected["velocity"]).abs().max().item() for each in velocities)
    image = (found["image"] - expected["image"]).abs().max().item() if "image" in expected else None
    if not velocity <= TOLERANCE or not (image is None or image <= IMAGE_TOLERANCE):
        raise RuntimeError(
            f"the export differs from base + adapter by {max(velocity, image or 0):.1e}; nothing was written"
        )
    return velocity, image


def _bytes(out: Path) -> int:
    return sum(file.stat().st_size for file in ([out] if out.is_file() else out.rglob("*")) if file.is_file())
