"""Adapters saved as PEFT folders, atomically, and put on a model, strictly. No pickle."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import save
from torch import Tensor, nn

from mmdit_lora.config.ranges import MAX_UPDATE
from mmdit_lora.errors import InputError, clip, counted, listed
from mmdit_lora.files import public_name, read_text
from mmdit_lora.lora.inject import (
    AdapterRollback,
    adapter_shapes,
    check_can_add,
    describe_lora,
    find_targets,
    inject,
    largest_update,
    with_adapter,
)
from mmdit_lora.lora.known_bases import remember_base
from mmdit_lora.lora.reading import (
    CONFIG_FILE,
    HEADER_KEY,
    KEY_PREFIX,
    WEIGHTS_FILE,
    StoredAdapter,
    adapter_file,
    read_adapter,
)
from mmdit_lora.models.adapter_layers import adapter_layers
from mmdit_lora.models.fingerprint import base_fingerprint
from mmdit_lora.outputs import new_folder

logger = logging.getLogger("mmdit_lora")

CARD = "README.md"


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
    metadata: Mapping[str, Any] | None = None,
    card: str | None = None,
    beside: Mapping[str, bytes] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    verb: str = "save_adapter",
) -> None:
    """Write a PEFT folder: `adapter_config.json`, `adapter_model.safetensors`, `README.md`; all or nothing.

        save_adapter(pipe.transformer, "outputs/adapter", metadata={"base": base, "fingerprint": base_fingerprint(transformer)})

    Args:
        metadata: goes as JSON into the safetensors header under `mmdit_lora`; its "base" also into the PEFT config, a hub id as
            it is, a folder by its name alone (the fingerprint says which base it is, a path says whose machine it was). None = the
            base's fingerprint and family, and what the LoRA is.
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
            f"the adapter holds NaN or infinity, in {', '.join(bad[:4])}", hint="train with a lower learning rate"
        )
    lora = cast(Any, model).peft_config[adapter_name]
    if metadata is None:
        own = {"fingerprint": base_fingerprint(model), "family": getattr(model, "family", None)}
        metadata = own | {"lora": describe_lora(lora), "r": lora.r, "alpha": lora.lora_alpha}
    remember_base(metadata.get("fingerprint"), metadata.get("base"))
    metadata = public_header(metadata)
    config = stored_config(lora)
    config |= {"base_model_name_or_path": metadata.get("base"), "inference_mode": True}
    header = {HEADER_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)}
    if card is None:
        card = (
            f"# Layout LoRA\n\nA {describe_lora(lora)} of the layout stream of `{metadata.get('base')}`, trained with "
            "mmdit-lora.\n"
        )
    with new_folder(folder, verb=verb) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_tensors(tensors, temporary / WEIGHTS_FILE, header)
        (temporary / CARD).write_text(card, encoding="utf-8")
        for name, content in (beside or {}).items():
            (temporary / name).write_bytes(content)


def read_card(adapter: str | Path) -> str | None:
    """Text of the README.md beside an adapter's weights; None where there is none, or none that can be read, with a warning."""
    file = adapter_file(adapter).parent / CARD
    if not os.path.lexists(file):
        return None
    try:
        return read_text(file, what="card of an adapter", limit=4 * 2**20)
    except InputError as error:
        logger.warning("the adapter's card is not taken along: %s", error)
        return None


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, in fp32, the same bytes in every process."""
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in tensors.items()}
    file.write_bytes(_in_order(save(stored, metadata={"format": "pt", **metadata})))


def public_header(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's metadata, the base by its public name."""
    base = metadata.get("base")
    return {**metadata, "base": public_name(base)} if isinstance(base, str) and base else dict(metadata)


def stored_config(config: peft.LoraConfig) -> dict[str, Any]:
    """A config as it is written to files, without paths of this machine."""
    base = config.base_model_name_or_path
    entries = config.to_dict() | {"base_model_name_or_path": None if base is None else public_name(base)}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in entries.items()}


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
    check_base: bool = True,
    allow_same: bool = False,
) -> StoredAdapter:
    """Add an adapter from a folder or file, as `train` or `export` (in any form but "merged") writes it.

        load_adapter(pipe.transformer, "outputs/run/adapter")
        load_adapter(pipe.transformer, "other/adapter", adapter_name="other")
        pipe.transformer.set_adapters(["default", "other"], [1.0, 0.5])

    It acts beside the adapters that are active, whose weights stay as they are. After `disable_lora` it acts alone: the others
    stay off, until `set_adapters` names them.

    Args:
        trainable: its weights train, in fp32, and all else is frozen; else it is frozen too.
        dtype: of its weights; default fp32.
        expect_fingerprint: `base_fingerprint(model)`, where the caller has it already.
        check_base: compare the model's fingerprint with the one in the adapter's header, if it has one. A quantised model has
            none to compare.
        allow_same: it may be on the model already under another name, to be used in its place.

    Returns:
        What was read.

    Raises:
        InputError: it is no adapter, is damaged, or fits another base: names and shapes must be equal as sets, and all are
            listed; or it is on the model already; or a number in it is not finite or absurd; or the model's weights are
            offloaded; or the name cannot be one or is taken; or the model is wrapped in a `PeftModel`, or has an adapter fused
            into its weights. The model is then as it was.
    """
    try:
        check_can_add(model, adapter_name)
    except InputError as error:
        raise error.at(str(folder)) from None
    stored = read_adapter(folder, model)
    path, config = stored.path, copy.deepcopy(stored.config)
    try:
        targets = find_targets(model, config)
    except InputError as error:
        raise error.at(f"{folder} does not fit this base") from None
    if any(p.is_meta for target in targets.values() for p in target.parameters()):
        raise InputError(
            "cannot be loaded: the model's weights are on the meta device, where sequential offloading keeps them",
            location=str(path),
            hint="load adapters first, then switch offloading on",
        )
    _refuse_unfit(stored, adapter_shapes(targets, config))
    if check_base or expect_fingerprint is not None:
        _refuse_other_base(stored, model, expect_fingerprint)
    config.init_lora_weights = True  # data-driven initialisations have done their work, and would ask for their data
    config.inference_mode = not trainable
    state = {name.removeprefix(KEY_PREFIX): value for name, value in stored.tensors.items()}
    undo = AdapterRollback([model])
    try:
        inject(model, config, adapter_name)
        outcome: Any = peft.set_peft_model_state_dict(model, state, adapter_name=adapter_name)
        if outcome.unexpected_keys:
            raise RuntimeError(f"PEFT did not take {', '.join(outcome.unexpected_keys[:8])}")
        twin = None if allow_same else same_adapter(model, adapter_name)
        if twin is not None:
            raise InputError(
                f"is on the model already, as {twin!r}: it would act twice",
                location=str(path),
                hint=f"give it once, with a larger weight; or take it off first: remove_adapter(model, {twin!r})",
            )
    except BaseException:
        undo(adapter_name)
        raise
    own = {with_adapter(name, adapter_name) for name in adapter_shapes(targets, config)}
    for name, parameter in model.named_parameters():
        if name in own:
            parameter.data = parameter.data.to(torch.float32 if trainable or dtype is None else dtype)
            parameter.requires_grad_(trainable)
        elif trainable:
            parameter.requires_grad_(False)
    return stored


def same_adapter(model: nn.Module, adapter_name: str) -> str | None:
    """Another adapter of the model that has the same weights at the same strength; None where there is none."""
    layers = [layer for _, layer in adapter_layers(model)]

    def strengths(name: str) -> list[float | None]:
        # Not the layers' `scaling`: `set_adapters` writes weights into it.
        power = 0.5 if getattr(cast(Any, model).peft_config[name], "use_rslora", False) else 1
        held = [isinstance(layer, LoraLayer) and name in layer.r for layer in layers]
        return [
            layer.lora_alpha[name] / layer.r[name] ** power if has else None
            for layer, has in zip(layers, held, strict=True)
        ]

    own, strength = lora_state_dict(model, adapter_name), strengths(adapter_name)
    for other in cast(Any, model).peft_config:
        if other == adapter_name or strengths(other) != strength:
            continue
        state = lora_state_dict(model, other)
        if own.keys() == state.keys() and all(
            value.shape == state[name].shape and torch.equal(value.to(state[name]), state[name])
            for name, value in own.items()
        ):
            return str(other)
    return None


def _refuse_unfit(stored: StoredAdapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Names, shapes and numbers of an adapter, against those that PEFT would give its targets."""
    expected = {KEY_PREFIX + name: shape for name, shape in shapes.items()}
    found = {name: tuple(value.shape) for name, value in stored.tensors.items()}
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {found[name]}, not {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name]
        ],
    }
    if any(faults.values()):
        bare = not any(name.startswith(KEY_PREFIX) for name in found)
        raise InputError(
            f"is not an adapter of this base: {counted(faults)}",
            location=str(stored.path),
            hint=f"PEFT keys begin with {KEY_PREFIX!r}; `mmdit-lora export --to peft` writes them"
            if bare
            else "load it on the base that it was trained on (`mmdit-lora inspect` shows which)",
        )
    # As they will act: what is finite in fp64 may not be in fp32.
    infinite = [n for n, v in stored.tensors.items() if not v.is_floating_point() or not v.float().isfinite().all()]
    if infinite:
        raise InputError(
            f"its weights are NaN or infinite: {counted({'not finite': infinite})}",
            location=str(stored.path),
            hint="the training that wrote it diverged, or the file is damaged: train at a lower learning rate, or get it anew",
        )
    config, alphas, absurd = stored.config, stored.config.alpha_pattern or {}, []
    for name, value in stored.tensors.items():
        module = name.removeprefix(KEY_PREFIX).removesuffix(".lora_A.weight")
        if name.endswith(".lora_A.weight"):
            alpha = abs(float(alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)))
            scale = alpha / (math.sqrt(len(value)) if config.use_rslora else len(value))
            largest = largest_update(stored.tensors[f"{KEY_PREFIX}{module}.lora_B.weight"], value, scale)
        else:
            largest = 0.0 if name.endswith(".lora_B.weight") else value.abs().max().item()
        absurd += [] if largest <= MAX_UPDATE else [name]
    if absurd:
        raise InputError(
            f"its update of {len(absurd)} linears is larger than {MAX_UPDATE:g} in an entry ({listed(absurd)})",
            location=str(stored.path),
            hint="its alpha or its weights are wrong: get it anew",
        )


def _refuse_other_base(stored: StoredAdapter, model: nn.Module, fingerprint: str | None) -> None:
    """Compare the base that an adapter states with the one that it is put on."""
    stated = stored.header.get("fingerprint")
    if stated is None or (fingerprint is None and getattr(model, "hf_quantizer", None) is not None):
        return
    fingerprint = fingerprint or base_fingerprint(model)
    if stated == fingerprint:
        return
    if any(p.dtype is torch.float16 for name, p in model.named_parameters() if "lora_" not in name):
        logger.warning("%s: whether it is of this base cannot be told in fp16", stored.path)
        return
    if fused := getattr(model, "fused_for_good", ()):
        raise InputError(
            f"does not fit these weights: {listed(fused)} was fused into them, and unloaded",
            location=str(stored.path),
            hint="open the base anew; `unfuse_lora()` before unloading keeps it as it was",
        )
    raise InputError(
        f"was trained on another base: {clip(repr(stored.header.get('base')), 100)}, fingerprint {str(stated)[:12]}..., "
        f"and this base has {fingerprint[:12]}...",
        location=str(stored.path),
        hint="load it on the base that it was trained on; in Python, check_base=False loads it all the same",
    )
