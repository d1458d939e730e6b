"""An adapter for other tools. Every export is read back in a fresh process and its outputs compared before it counts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdit_lora.errors import InputError
from mmdit_lora.export_creatilayout import write_creatilayout_adapter, write_creatilayout_stream
from mmdit_lora.export_read import open_transformer, outputs
from mmdit_lora.files import atomic_file
from mmdit_lora.lora import (
    HEADER_KEY,
    base_fingerprint,
    load_adapter,
    lora_state_dict,
    merge_adapter,
    read_adapter_header,
    save_adapter,
)
from mmdit_lora.models.creatilayout import SLOTS
from mmdit_lora.outputs import Inputs, check_new_file, check_new_folder, new_folder, refuse_inputs
from mmdit_lora.pipelines import LayoutPipeline, load_pipeline, quiet

Target = Literal["peft", "diffusers", "kohya", "creatilayout", "merged"]
TARGETS: tuple[Target, ...] = get_args(Target)
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far its outputs, read back in a fresh process, are from those of base + adapter.

    Args:
        max_abs_diff: largest difference of the predicted velocity, over two random inputs with three boxes each.
        effect: largest difference that the adapter itself makes there (of a stream alone: the layout); 0 would mean that
            it does nothing.
        note: what the other tool does otherwise, if anything.
    """

    to: str
    out: str
    bytes: int
    max_abs_diff: float
    effect: float
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_adapter(
    adapter: str | Path, *, to: Target, out: str | Path, base: str | None = None, merge: bool = False
) -> ExportReport:
    """Write `out`, read it back in a fresh process, compare.

    Args:
        to: "peft" a PEFT folder; "diffusers" a folder for `pipe.load_lora_weights`; "kohya" one .safetensors file in the
            names of kohya-ss/sd-scripts; "creatilayout" a folder under CreatiLayout's names, for its `load_lora_adapter`;
            "merged" a whole base with the adapter in its weights (fp32).
        base: folder or hub id; None = the one that the adapter names.
        merge: "creatilayout" only: the whole layout stream with the adapter in its weights.

    Raises:
        InputError: `adapter` is none, does not fit the base or the format, or `out` exists and is not an export.
        RuntimeError: what was written does not give the same outputs; it is removed again.
    """
    out = Path(out)
    _check_out(to, out, {"ADAPTER": adapter, "--base": base})
    if to == "creatilayout" and (Path(adapter) / "transformer").is_dir():
        return _export_stream(str(adapter), out)
    base = base or base_of(adapter)
    refuse_inputs([out], {"--base": base}, verb="export")
    with _place(to, out) as temporary:
        pipe, header = _open(adapter, base)
        note = _note(to, pipe.transformer)
        expected, effect = _reference(pipe.transformer)
        if merge:
            write_creatilayout_stream(merge_adapter(pipe.transformer, in_place=True), temporary)
        else:
            _write(to, pipe, temporary, adapter, header)
        difference = _compare("creatilayout stream" if merge else to, temporary, base, expected)
    return ExportReport(to, str(out), _bytes(out), difference, effect, note)


def verify_adapter(adapter: str | Path, *, base: str | None = None) -> dict[str, Any]:
    """Load an adapter on its base, strictly, and again with PEFT alone in a fresh process; compare.

    Returns:
        base, fingerprint, parameters, `effect` (largest change of the velocity that it makes) and `max_abs_diff`.

    Raises:
        InputError: it is no adapter, damaged, of another base, or has no effect at all.
    """
    base = base or base_of(adapter)
    pipe, header = _open(adapter, base)
    expected, effect = _reference(pipe.transformer)
    difference = _read_back("peft", Path(adapter), base, expected)
    if effect == 0:
        raise InputError("changes nothing: its weights are all zero", where=str(adapter), cure="train it for longer")
    if difference > TOLERANCE:
        raise InputError(f"PEFT alone gives other outputs, by {difference:.1e}", where=str(adapter))
    count = sum(p.numel() for name, p in pipe.transformer.named_parameters() if "lora_" in name)
    named: dict[str, Any] = {key: header[key] for key in ("fingerprint", "version") if key in header}
    return {
        "adapter": str(adapter),
        "base": base,
        **named,
        "parameters": count,
        "effect": effect,
        "max_abs_diff": difference,
    }


def base_of(adapter: str | Path) -> str:
    """The base that an adapter names in its header or PEFT config.

    Raises:
        InputError: it names none.
    """
    name = read_adapter_header(adapter).get("base")
    if not name:
        name = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8")).get(
            "base_model_name_or_path"
        )
    if not name:
        raise InputError("does not say which base it is for", where=str(adapter), cure="give --base")
    return str(name)


def _open(adapter: str | Path, base: str) -> tuple[LayoutPipeline, dict[str, Any]]:
    header = read_adapter_header(adapter)
    pipe = load_pipeline(base)
    load_adapter(pipe.transformer, adapter, expect_fingerprint=base_fingerprint(pipe.transformer))
    pipe.transformer.eval()
    return pipe, header


def _export_stream(base: str, out: Path) -> ExportReport:
    """A base's own layout stream under CreatiLayout's names."""
    model = open_transformer(base).eval()
    expected = outputs(model)
    effect = (expected - outputs(model, layout_scale=0.0)).abs().max().item()
    with new_folder(out, verb="export") as temporary:
        write_creatilayout_stream(model, temporary)
        difference = _compare("creatilayout stream", temporary, base, expected)
    return ExportReport("creatilayout", str(out), _bytes(out), difference, effect, _note("creatilayout", model))


def _note(to: Target, model: Any) -> str | None:
    if to != "creatilayout" or (model.config.layout_slots == SLOTS and not model.config.mask_padding):
        return None
    return (
        f"CreatiLayout's own code fills up to {SLOTS} boxes and attends to the filling; this base does not, so pictures "
        "painted there differ from those painted here"
    )


def _write(to: Target, pipe: LayoutPipeline, path: Path, adapter: str | Path, header: dict[str, Any]) -> None:
    model = pipe.transformer
    if to == "peft":
        card = Path(adapter) / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else None
        save_adapter(model, path, metadata=header, card=text)
    elif to == "diffusers":
        _write_diffusers(pipe, path)
    elif to == "kohya":
        _write_kohya(model, path, header)
    elif to == "creatilayout":
        write_creatilayout_adapter(model, path)
    else:
        pipe.transformer = merge_adapter(model, in_place=True)
        with quiet():
            pipe.save_pretrained(path)


def _write_diffusers(pipe: LayoutPipeline, folder: Path) -> None:
    """What `pipe.load_lora_weights` reads; rank, alpha and targets are in the file's header."""
    writer: Any = type(pipe)
    writer.save_lora_weights(
        folder,
        transformer_lora_layers=_for_file(lora_state_dict(pipe.transformer)),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )


def _write_kohya(model: Any, file: Path, header: dict[str, Any]) -> None:
    """One file in the names of kohya-ss/sd-scripts: `lora_<module, dots as underscores>.lora_down.weight`, ...

    Their update is alpha / rank * up @ down, whatever scaling PEFT was told to use.
    """
    config = model.peft_config["default"]
    if config.use_dora or config.lora_bias:
        raise InputError(
            "is a DoRA or has biases, which these names cannot hold", cure="export it --to peft or diffusers"
        )
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.scaling:
            flat = "lora_" + name.replace(".", "_")
            tensors[f"{flat}.lora_down.weight"] = module.lora_A["default"].weight
            tensors[f"{flat}.lora_up.weight"] = module.lora_B["default"].weight
            tensors[f"{flat}.alpha"] = torch.tensor(module.scaling["default"] * module.r["default"])
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(config.lora_alpha),
        "ss_base_model_version": model.family,
        "ss_sd_model_name": str(header.get("base", "")),
        HEADER_KEY: json.dumps(header, sort_keys=True),
    }
    save_file(_for_file(tensors), file, metadata=metadata)


def _for_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in tensors.items()}


@torch.no_grad()
def _reference(model: Any) -> tuple[Tensor, float]:
    """Outputs with the adapter, and how much it changes them."""
    expected = outputs(model)
    model.disable_lora()
    effect = (expected - outputs(model)).abs().max().item()
    model.enable_lora()
    return expected, effect


def _read_back(to: str, written: Path, base: str, expected: Tensor) -> float:
    """Largest difference of outputs, from a process that has only the files."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "outputs.safetensors"
        command = [sys.executable, "-m", "mmdit_lora.export_read", to, str(written), base, str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the export cannot be read back: {done.stderr.strip().splitlines()[-1]}")
        return (load_file(answer)["sample"] - expected).abs().max().item()


def _compare(to: str, written: Path, base: str, expected: Tensor) -> float:
    difference = _read_back(to, written, base, expected)
    if difference > TOLERANCE:
        raise RuntimeError(f"the export differs from base + adapter by {difference:.1e}; nothing was written")
    return difference


@contextmanager
def _place(to: Target, out: Path) -> Iterator[Path]:
    """Where the export is written before it counts."""
    with atomic_file(out) if to == "kohya" else new_folder(out, verb="export") as temporary:
        yield temporary


def _check_out(to: Target, out: Path, inputs: Inputs) -> None:
    """Before any work: `out` is free, or an earlier export."""
    if to != "kohya":
        check_new_folder(out, verb="export", inputs=inputs)
        return
    if out.suffix != ".safetensors":
        raise InputError("is one file", where=f"--out {out}", cure="give a name that ends in .safetensors")
    check_new_file(out, verb="export", inputs=inputs, is_own=_is_own_file)


def _is_own_file(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {HEADER_KEY, "ss_network_module"} <= (tensors.metadata() or {}).keys()
    except (SafetensorError, OSError):
        return False


def _bytes(out: Path) -> int:
    return sum(file.stat().st_size for file in ([out] if out.is_file() else out.rglob("*")) if file.is_file())
