"""An adapter for other tools. Every export is read back in a fresh process and its outputs compared before it counts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdit_lora.errors import InputError
from mmdit_lora.files import atomic_folder
from mmdit_lora.lora import base_fingerprint, load_adapter, merge_adapter, read_adapter_header, save_adapter
from mmdit_lora.models import LayoutInputs, LayoutSD3Transformer2DModel
from mmdit_lora.pipelines import LayoutStableDiffusion3Pipeline, load_pipeline, quiet

Target = Literal["peft", "merged"]
TARGETS: tuple[Target, ...] = ("peft", "merged")
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far its outputs, read back in a fresh process, are from those of base + adapter.

    Args:
        max_abs_diff: largest difference of the predicted velocity, over two random inputs with three boxes each.
        effect: largest difference that the adapter itself makes there; 0 would mean that it does nothing.
    """

    to: str
    out: str
    bytes: int
    max_abs_diff: float
    effect: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_adapter(adapter: str | Path, *, to: Target, out: str | Path, base: str | None = None) -> ExportReport:
    """Write `out`: "peft" a PEFT folder, "merged" a whole base with the adapter in its weights (fp32).

    Args:
        base: folder or hub id; None = the one that the adapter names.

    Raises:
        InputError: `adapter` is none, does not fit the base, or `out` exists and is not an export.
        RuntimeError: what was written does not give the same outputs; it is removed again.
    """
    out = Path(out)
    _check_out(out)
    base = base or base_of(adapter)
    pipe, header = _open(adapter, base)
    model = pipe.transformer
    with tempfile.TemporaryDirectory() as scratch:
        expected, effect = _reference(model)
        with atomic_folder(out) as temporary:
            if to == "peft":
                card = Path(adapter) / "README.md"
                text = card.read_text(encoding="utf-8") if card.is_file() else None
                save_adapter(model, temporary, metadata=header, card=text)
            else:
                pipe.transformer = merge_adapter(model, in_place=True)
                with quiet():
                    pipe.save_pretrained(temporary)
            difference = _read_back(to, temporary, base, Path(scratch), expected)
            if difference > TOLERANCE:
                raise RuntimeError(f"the export differs from base + adapter by {difference:.1e}; nothing was written")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return ExportReport(to, str(out), size, difference, effect)


def verify_adapter(adapter: str | Path, *, base: str | None = None) -> dict[str, Any]:
    """Load an adapter on its base, strictly, and again with PEFT alone in a fresh process; compare.

    Returns:
        base, fingerprint, parameters, `effect` (largest change of the velocity that it makes) and `max_abs_diff`.

    Raises:
        InputError: it is no adapter, damaged, of another base, or has no effect at all.
    """
    base = base or base_of(adapter)
    pipe, header = _open(adapter, base)
    with tempfile.TemporaryDirectory() as scratch:
        expected, effect = _reference(pipe.transformer)
        difference = _read_back("peft", Path(adapter), base, Path(scratch), expected)
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


def probe(model: Any, *, seed: int = 0) -> dict[str, Any]:
    """Random inputs of `forward` that reach every layer of `model`: two samples, three boxes each, the last one masked once."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    corners = torch.rand(2, 3, 2, 2, generator=generator).sort(dim=2).values
    mask = torch.tensor([[True, True, True], [True, True, False]])
    side = min(config.sample_size, 64)
    return {
        "hidden_states": normal(2, config.in_channels, side, side),
        "encoder_hidden_states": normal(2, 8, config.joint_attention_dim),
        "pooled_projections": normal(2, config.pooled_projection_dim),
        "timestep": torch.tensor([300.0, 800.0]),
        "layout": LayoutInputs(corners.flatten(2), normal(2, 3, model.phrase_dim), mask),
    }


def _open(adapter: str | Path, base: str) -> tuple[LayoutStableDiffusion3Pipeline, dict[str, Any]]:
    header = read_adapter_header(adapter)
    pipe = load_pipeline(base)
    load_adapter(pipe.transformer, adapter, expect_fingerprint=base_fingerprint(pipe.transformer))
    pipe.transformer.eval()
    return pipe, header


@torch.no_grad()
def _reference(model: Any) -> tuple[Tensor, float]:
    """Outputs with the adapter, and how much it changes them."""
    inputs = probe(model)
    expected = model(**inputs).sample
    model.disable_lora()
    effect = (expected - model(**inputs).sample).abs().max().item()
    model.enable_lora()
    return expected, effect


def _read_back(to: str, folder: Path, base: str, scratch: Path, expected: Tensor) -> float:
    """Largest difference of outputs, from a process that has only the files."""
    answer = scratch / "outputs.safetensors"
    command = [sys.executable, "-m", "mmdit_lora.export", to, str(folder), base, str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the export cannot be read back: {done.stderr.strip().splitlines()[-1]}")
    return (load_file(answer)["sample"] - expected).abs().max().item()


def _main(to: str, folder: str, base: str, answer: str) -> None:
    """The fresh process: diffusers and PEFT read the files; nothing of this module's writing side is used."""
    model: Any
    if to == "peft":
        from peft import PeftModel

        transformer = LayoutSD3Transformer2DModel.from_pretrained(base, subfolder="transformer", dtype=torch.float32)
        model = PeftModel.from_pretrained(transformer, folder)
        inputs = probe(transformer)
    else:
        model = LayoutStableDiffusion3Pipeline.from_pretrained(folder).transformer
        inputs = probe(model)
    model.eval()
    with torch.no_grad():
        save_file({"sample": model(**inputs).sample.contiguous()}, answer)


def _check_out(out: Path) -> None:
    ours = ("adapter_config.json", "model_index.json")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in ours)):
        raise InputError("exists and is not an export", where=str(out), cure="give another --out")


if __name__ == "__main__":
    _main(*sys.argv[1:])
