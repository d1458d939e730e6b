"""Adapters as PEFT folders: written atomically, read strictly. No pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mmdit_lora.errors import InputError, listed
from mmdit_lora.lora.adapt import adapter_shapes, find_targets, inject, with_adapter
from mmdit_lora.outputs import new_folder

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."  # PEFT loads keys without it as nothing, with a mere warning
HEADER_KEY = "mmdit_lora"


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters but LoRA.

    Values are rounded to bf16 first, so that a base gives one fingerprint as stored (fp16, bf16 or fp32), opened as fp32
    and opened as bf16, with or without adapters. A quantised base has a fingerprint of its own.

    Raises:
        ValueError: the model is on the meta device.
    """
    digest = hashlib.sha256()
    named = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if "lora_" not in name}
    for name in sorted(named):
        value = named[name].detach()
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device: a fingerprint needs values")
        value = value.to(torch.bfloat16) if value.is_floating_point() else value
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def lora_state_dict(
    model: nn.Module, adapter_name: str = "default", weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapter's tensors as PEFT names them on an injected model: `<module>.lora_A.weight`, sorted.

    Args:
        weights: to be taken instead of the model's own, by the names of its parameters.
    """
    own = None if weights is None else dict(weights)
    state = peft.get_peft_model_state_dict(model, state_dict=own, adapter_name=adapter_name)
    return {name: state[name].detach() for name in sorted(state)}


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    metadata: Mapping[str, Any],
    card: str | None = None,
    beside: Mapping[str, bytes] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    verb: str = "save_adapter",
) -> None:
    """Write a PEFT folder: `adapter_config.json`, `adapter_model.safetensors`, `README.md`; all or nothing.

    Args:
        metadata: goes as JSON into the safetensors header under `mmdit_lora`; its "base" also into the PEFT config.
        card: text of README.md; None = two lines.
        beside: other files, name -> content.
        weights: of the adapter's parameters, by their names in the model, where that has only a part of each (FSDP).
        verb: what writes it: a folder that the same has written is replaced, no other (see `outputs.new_folder`).

    Raises:
        InputError: `folder` holds something else; the model has no such adapter, or a weight is not finite (a diverged run is not saved as a good one).
    """
    if adapter_name not in getattr(model, "peft_config", {}):
        raise InputError(f"the model has no adapter {adapter_name!r}")
    tensors = {
        KEY_PREFIX + name: value.to("cpu", torch.float32).contiguous()
        for name, value in lora_state_dict(model, adapter_name, weights).items()
    }
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise InputError(
            f"the adapter holds NaN or infinity, in {', '.join(bad[:4])}", cure="train with a lower learning rate"
        )
    config: dict[str, Any] = cast(Any, model).peft_config[adapter_name].to_dict()
    config |= {"base_model_name_or_path": metadata.get("base"), "inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    header = {"format": "pt", HEADER_KEY: json.dumps(dict(metadata), sort_keys=True, allow_nan=False)}
    if card is None:
        card = (
            f"# Layout LoRA\n\nAn adapter of the layout stream of `{metadata.get('base')}`, trained with mmdit-lora.\n"
        )
    with new_folder(folder, verb=verb) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (temporary / WEIGHTS_FILE).write_bytes(_in_order(save(tensors, metadata=header)))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for name, content in (beside or {}).items():
            (temporary / name).write_bytes(content)


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in the order of their keys: safetensors writes them in another at every start."""
    size = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    metadata = dict(sorted(header.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    dtype: torch.dtype | None = None,
    expect_fingerprint: str | None = None,
) -> None:
    """Add an adapter from a PEFT folder. It acts beside the adapters that are active, whose weights stay as they are
    (`model.set_adapters([...], weights)` chooses and mixes).

    Args:
        trainable: its weights train, in fp32, and all else is frozen; else it is frozen too.
        dtype: of its weights; default fp32.
        expect_fingerprint: `base_fingerprint(model)`; compared with the one in the adapter's header, if it has one.

    Raises:
        InputError: the folder is no adapter, is damaged, or fits another base: names and shapes must be equal as sets, and
            all are listed. Or the model's weights are offloaded. The model is then as it was.
    """
    path = Path(folder) / WEIGHTS_FILE
    config = read_adapter_config(folder)
    tensors, header = _read_weights(path)
    if adapter_name in getattr(model, "peft_config", {}):
        raise InputError(f"the model has an adapter {adapter_name!r} already", cure="give the new one another name")
    try:
        targets = find_targets(model, config)
    except InputError as error:
        raise error.at(f"{folder} does not fit this base") from None
    if any(p.is_meta for target in targets.values() for p in target.parameters()):
        raise InputError(
            "cannot be loaded: the model's weights are on the meta device, where sequential offloading keeps them",
            where=str(path),
            cure="load adapters first, then switch offloading on",
        )
    expected = {KEY_PREFIX + name: shape for name, shape in adapter_shapes(targets, config).items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {found[name]}, not {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name]
        ],
        "not finite": sorted(
            name for name, v in tensors.items() if not v.is_floating_point() or not v.isfinite().all()
        ),
    }
    if any(faults.values()):
        bare = any(not name.startswith(KEY_PREFIX) for name in found)
        raise InputError(
            "is not an adapter of this base: "
            + "; ".join(f"{len(names)} {kind} ({listed(names)})" for kind, names in faults.items() if names),
            where=str(path),
            cure=f"PEFT keys begin with {KEY_PREFIX!r}; `mmdit-lora export --to peft` writes them"
            if bare
            else "load it on the base that it was trained on (`mmdit-lora inspect` shows which)",
        )
    if expect_fingerprint is not None and header.get("fingerprint", expect_fingerprint) != expect_fingerprint:
        raise InputError(
            f"was trained on another base: {header.get('base')!r}, fingerprint {str(header['fingerprint'])[:12]}..., "
            f"and this base has {expect_fingerprint[:12]}...",
            where=str(path),
            cure="load it on the base that it was trained on",
        )
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    config.init_lora_weights = True  # data-driven initialisations have done their work, and would ask for their data
    config.inference_mode = not trainable
    inject(model, config, adapter_name)
    state = {name.removeprefix(KEY_PREFIX): value for name, value in tensors.items()}
    outcome: Any = peft.set_peft_model_state_dict(model, state, adapter_name=adapter_name)
    if outcome.unexpected_keys:
        raise RuntimeError(f"PEFT did not take {', '.join(outcome.unexpected_keys[:8])}")
    own = {with_adapter(name, adapter_name) for name in adapter_shapes(targets, config)}
    for name, parameter in model.named_parameters():
        if name in own:
            parameter.data = parameter.data.to(torch.float32 if trainable or dtype is None else dtype)
            parameter.requires_grad_(trainable)
        else:
            # PEFT freezes all that is not LoRA; loading an adapter to look at it must not stop what was training.
            parameter.requires_grad_(not trainable and name.replace(".base_layer.", ".") not in frozen)


def read_adapter_header(folder: str | Path) -> dict[str, Any]:
    """The `mmdit_lora` metadata of an adapter; empty for an adapter that another tool wrote.

    Raises:
        InputError: no such file, no safetensors file, or its metadata is not a JSON object.
    """
    return _read_weights(Path(folder) / WEIGHTS_FILE, tensors=False)[1]


def read_adapter_config(folder: str | Path) -> peft.LoraConfig:
    """The `LoraConfig` of an adapter folder.

    Raises:
        InputError: no such file, not JSON, or not the config of a LoRA.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"no {CONFIG_FILE}", where=str(folder), cure="give an adapter folder as `mmdit-lora train` writes it"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON: {error}", where=str(path)) from None
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        kind = data.get("peft_type") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"is not the config of a LoRA: peft_type is {kind!r}", where=str(path))
    try:
        config = cast(peft.LoraConfig, peft.LoraConfig.from_peft_type(**data))
        ranks = [config.r, *(config.rank_pattern or {}).values()]
        alphas = [config.lora_alpha, *(config.alpha_pattern or {}).values()]
        if not all(isinstance(r, int) and not isinstance(r, bool) and r > 0 for r in ranks):
            raise ValueError(f"ranks {ranks} are not whole numbers above 0")
        if not all(isinstance(a, int | float) for a in alphas):
            raise ValueError(f"alphas {alphas} are not numbers")
    except Exception as error:  # whatever PEFT makes of a config that is not one
        raise InputError(f"is not a valid LoraConfig: {error}", where=str(path)) from None
    return config


def _read_weights(path: Path, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise InputError("no such file", where=str(path), cure="give an adapter folder as `mmdit-lora train` writes it")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER_KEY, "{}")
            state = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"is not a safetensors file: {error}", where=str(path), cure="the file is damaged: get it anew"
        ) from None
    try:
        metadata = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its header {HEADER_KEY!r} is not JSON: {error}", where=str(path)) from None
    if not isinstance(metadata, dict):
        raise InputError(f"its header {HEADER_KEY!r} is not a JSON object", where=str(path))
    return state, metadata
