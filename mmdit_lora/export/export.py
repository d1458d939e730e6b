"""An adapter for other tools. Every export is used in a fresh process as its user would, and compared before it counts."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mmdit_lora.config.loading import parse_yaml
from mmdit_lora.errors import InputError, clip
from mmdit_lora.export.creatilayout import write_creatilayout_adapter, write_creatilayout_stream
from mmdit_lora.export.read_back import answers, open_transformer, outputs
from mmdit_lora.files import atomic_file, public_name, read_text
from mmdit_lora.lora import (
    CONFIG_FILE,
    DIFFUSERS_FILE,
    HEADER_KEY,
    KOHYA_PREFIX,
    StoredAdapter,
    adapter_file,
    load_adapter,
    lora_state_dict,
    merge_adapter,
    public_header,
    read_adapter_config,
    read_adapter_header,
    read_card,
    save_adapter,
    save_tensors,
    stored_config,
)
from mmdit_lora.lora.known_bases import recall_base, recall_named, remember_base
from mmdit_lora.models.creatilayout import SLOTS, variant_of_model
from mmdit_lora.models.families import stored_transformer
from mmdit_lora.outputs import Inputs, check_new_file, check_new_folder, new_folder, refuse_inputs
from mmdit_lora.pipelines import LayoutPipeline, load_pipeline, quiet
from mmdit_lora.resources import resource

Target = Literal["peft", "diffusers", "kohya", "creatilayout", "merged"]
TARGETS: tuple[Target, ...] = get_args(Target)
_DIGEST_KEY = "mmdit_lora_sha256"  # in the header of a file of its own
TOLERANCE = 1e-4  # of the velocity
IMAGE_TOLERANCE = 2e-3  # half a grey level of [0, 1]: sampling adds up the differences of its steps


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far its outputs, read back in a fresh process, are from those of base + adapter.

    Args:
        max_abs_diff: largest difference of the predicted velocity, over two random inputs with three boxes each.
        max_image_diff: largest difference of a sampled image, in [0, 1]; None where nothing was sampled.
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
    adapter: str | Path, *, to: Target, out: str | Path, base: str | None = None, merge: bool = False
) -> ExportReport:
    """Write `out`, use it in a fresh process by the loader that it is for, and compare: the velocity for random inputs, and a
    sampled image, twice with one seed.

    What is written carries no dropout, so that no loader can leave it on; the header keeps the trained value.

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
    out = _check_out(to, out, {"ADAPTER": adapter, "--base": base})
    if to == "creatilayout" and (Path(adapter) / "transformer").is_dir():
        return _export_stream(str(adapter), out)
    base = base or base_of(adapter)
    refuse_inputs([out], {"--base": base}, verb="export")
    if to == "creatilayout":  # known from its config, before any weight is opened
        transformer, stored_config = stored_transformer(base)
        with torch.device("meta"):
            variant_of_model(cast(Any, transformer).from_config(stored_config))
    with _place(to, out) as temporary:
        pipe, stored = _open(adapter, base)
        config = pipe.transformer.peft_config["default"]
        header = public_header({"base": base, "lora_dropout": config.lora_dropout, **stored.header})
        config.lora_dropout = 0.0
        note = _note(to, pipe.transformer)
        expected, effect = _reference(pipe)
        if merge:
            write_creatilayout_stream(merge_adapter(pipe.transformer, in_place=True), temporary)
        else:
            _write(to, pipe, temporary, adapter, header)
        del pipe  # the fresh process needs the memory
        gc.collect()
        differences = _compare("creatilayout stream" if merge else to, temporary, base, expected)
    return ExportReport(to, str(out), _bytes(out), differences[0], effect, note, differences[1])


def verify_adapter(adapter: str | Path, *, base: str | None = None) -> dict[str, Any]:
    """Load an adapter on its base, strictly, and again in a fresh process by the loader that its form is for (a PEFT folder: by
    PEFT alone); compare.

    Returns:
        base, form, fingerprint, parameters, `effect` (largest change of the velocity that it makes), `max_abs_diff` and
        `max_image_diff`.

    Raises:
        InputError: it is no adapter, damaged, of another base, or has no effect at all; or PEFT cannot load it by its config.
    """
    base = base or base_of(adapter)
    pipe, stored = _open(adapter, base)
    expected, effect = _reference(pipe)
    count = sum(p.numel() for name, p in pipe.transformer.named_parameters() if "lora_" in name)
    del pipe
    gc.collect()
    if effect == 0:
        raise InputError("changes nothing: its weights are all zero", location=str(adapter), hint="train it for longer")
    # PEFT would try a file's regular expressions on every module, and one that backtracks takes minutes.
    form = (
        "peft" if stored.form == "peft" and _states_names(stored) else stored.form if stored.form != "peft" else "ours"
    )
    try:
        differences = _compare(form, stored.path.parent if stored.form == "peft" else stored.path, base, expected)
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


def base_of(adapter: str | Path) -> str:
    """The base that an adapter names in its header or PEFT config, where it is: a path (or hub id) that can be opened.

    Adapters name a folder by its name alone. It is looked for where the run beside the adapter says, then where this machine
    last had a base of its fingerprint (`lora/known_bases.py`), then under this name in the current directory, its `data`, the
    folders above the adapter, then the base that the package brings along, then where there last was a base of this name. Whether it
    is the right one is for the fingerprint to say.

    Raises:
        InputError: it names none, or a folder that is not found.
    """
    file = adapter_file(adapter)
    header = read_adapter_header(adapter)
    name = header.get("base")
    if not name and (file.parent / CONFIG_FILE).is_file():
        name = read_adapter_config(file.parent).base_model_name_or_path
    if not isinstance(name, str) or not name:
        raise InputError("does not say which base it is for", location=str(adapter), hint="give --base")
    if _is_base(Path(name)):
        return name
    short = public_name(name)
    here = list(file.resolve().parents)
    beside = [run for run in map(_base_of_run, here[1:2]) if run is not None and public_name(run) == short]
    roots = [Path(), Path("data"), *here[:3]]
    noted = recall_base(header.get("fingerprint"))
    packaged = resource(f"data/{short}")
    for folder in (*beside, noted, *(root / short for root in roots), packaged, recall_named(short)):
        if folder is not None and _is_base(folder):
            return str(folder)
    if "/" in short:
        return short  # a hub id
    raise InputError(
        f"names its base {clip(repr(short), 100)}, and no such folder is here",
        location=str(adapter),
        hint="give --base FOLDER",
    )


def _is_base(folder: Path) -> bool:
    try:
        return (folder / "model_index.json").is_file()
    except (OSError, ValueError):
        return False


def _base_of_run(folder: Path) -> Path | None:
    """The base that the config of a run in `folder` states."""
    try:
        file = folder / "config.yaml"
        return Path(parse_yaml(read_text(file, what="config", limit=2**20), location=str(file))[0]["base"])
    except (InputError, TypeError, KeyError):
        return None


def _states_names(stored: StoredAdapter) -> bool:
    """Whether the config is read as it is stored: it has no regular expressions."""
    config = read_adapter_config(stored.path.parent)
    keys = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")
    return all(getattr(config, key) == getattr(stored.config, key) for key in keys)


def _open(adapter: str | Path, base: str) -> tuple[LayoutPipeline, StoredAdapter]:
    pipe = load_pipeline(base)
    stored = load_adapter(pipe.transformer, adapter)
    remember_base(stored.header.get("fingerprint"), base)
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
    if to == "kohya":
        return (
            "mmdit-lora reads this file (load_lora_weights, sample --adapter); sd-scripts and ComfyUI have no layout stream, so "
            "none of its keys means anything to them"
        )
    if to == "merged":
        return "mmdit-lora opens this base; stock diffusers and ComfyUI have no layout stream, and would drop it"
    if to != "creatilayout" or (model.config.layout_slots == SLOTS and not model.config.mask_padding):
        return None
    return (
        f"CreatiLayout's own code fills up to {SLOTS} boxes and attends to the filling; this base does not, so images "
        "painted there differ from those painted here"
    )


def _write(to: Target, pipe: LayoutPipeline, path: Path, adapter: str | Path, header: dict[str, Any]) -> None:
    model = pipe.transformer
    if to == "peft":
        save_adapter(model, path, metadata=header, card=read_card(adapter))
    elif to == "diffusers":
        _write_diffusers(model, path, header)
    elif to == "kohya":
        _write_kohya(model, path, header)
    elif to == "creatilayout":
        write_creatilayout_adapter(model, path, header)
    else:
        pipe.transformer = merge_adapter(model, in_place=True)
        with quiet():
            pipe.save_pretrained(path)


def _write_diffusers(model: Any, folder: Path, header: dict[str, Any]) -> None:
    """What `pipe.load_lora_weights` reads; rank, alpha and targets are in the file's header."""
    prefix = "transformer."
    config = {prefix + key: value for key, value in stored_config(model.peft_config["default"]).items()}
    metadata = {
        LORA_ADAPTER_METADATA_KEY: json.dumps(config, sort_keys=True),
        HEADER_KEY: json.dumps(header, sort_keys=True),
    }
    tensors = {prefix + name: value for name, value in lora_state_dict(model).items()}
    save_tensors(tensors, folder / DIFFUSERS_FILE, metadata)


def _write_kohya(model: Any, file: Path, header: dict[str, Any]) -> None:
    """One file in the names of kohya-ss/sd-scripts: `lora_unet_<module, dots as underscores>.lora_down.weight`, ...

    Their update is alpha / rank * up @ down, whatever scaling PEFT was told to use.
    """
    config = model.peft_config["default"]
    if config.use_dora or config.lora_bias:
        raise InputError(
            "is a DoRA or has biases, which these names cannot hold", hint="export it --to peft or diffusers"
        )
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.scaling:
            flat = KOHYA_PREFIX + name.replace(".", "_")
            tensors[f"{flat}.lora_down.weight"] = module.lora_A["default"].weight
            tensors[f"{flat}.lora_up.weight"] = module.lora_B["default"].weight
            tensors[f"{flat}.alpha"] = torch.tensor(module.scaling["default"] * module.r["default"])
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(config.lora_alpha),
        "ss_base_model_version": model.family,
        "ss_sd_model_name": str(header.get("base", "")),
        HEADER_KEY: json.dumps(header, sort_keys=True),
    }
    # Who changes the file, and how, is not known: by the digest it is told from what was written.
    tensors = {name: value.to(torch.float32) for name, value in tensors.items()}
    save_tensors(tensors, file, {**metadata, _DIGEST_KEY: _digest(tensors, metadata)})


def _reference(pipe: LayoutPipeline) -> tuple[dict[str, Tensor], float]:
    """What base + adapter answers, and how much the adapter changes of the velocity."""
    expected = answers(pipe, twice=False)
    pipe.transformer.disable_lora()
    effect = (expected["velocity"] - outputs(pipe.transformer)).abs().max().item()
    pipe.transformer.enable_lora()
    return expected, effect


def _read_back(to: str, written: Path, base: str) -> dict[str, Tensor]:
    """The answers of a process that has only the files."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answers.safetensors"
        command = [sys.executable, "-m", "mmdit_lora.export.read_back", to, str(written), base, str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"the export cannot be read back: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
            )
        return {name: value.clone() for name, value in load_file(answer).items()}


def _compare(to: str, written: Path, base: str, expected: dict[str, Tensor]) -> tuple[float, float | None]:
    """Largest differences of velocity and image, of what a fresh process answers twice.

    Raises:
        RuntimeError: they are too large, or the second answer is not the first, as with dropout left on.
    """
    found = _read_back(to, written, base)
    for name in expected:
        if not torch.equal(found[name], found[f"{name} again"]):
            raise RuntimeError(f"the export gives another {name} when it is asked again; nothing was written")
    velocity = (found["velocity"] - expected["velocity"]).abs().max().item()
    image = (found["image"] - expected["image"]).abs().max().item() if "image" in expected else None
    if not velocity <= TOLERANCE or not (image is None or image <= IMAGE_TOLERANCE):
        raise RuntimeError(
            f"the export differs from base + adapter by {max(velocity, image or 0):.1e}; nothing was written"
        )
    return velocity, image


@contextmanager
def _place(to: Target, out: Path) -> Iterator[Path]:
    """Where the export is written before it counts."""
    with atomic_file(out) if to == "kohya" else new_folder(out, verb="export") as temporary:
        yield temporary


def _check_out(to: Target, out: str | Path, inputs: Inputs) -> Path:
    """Before any work: `out` is free, or an earlier export."""
    if to != "kohya":
        check_new_folder(out, verb="export", inputs=inputs)
    elif Path(out).suffix != ".safetensors":
        raise InputError("is one file", location=f"--out {out}", hint="give a name that ends in .safetensors")
    else:
        check_new_file(out, verb="export", inputs=inputs, is_own=_is_own_file)
    return Path(out)


def _is_own_file(file: Path) -> bool:
    """Whether a file is what `_write_kohya` wrote, unchanged."""
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        return metadata.get(_DIGEST_KEY) == _digest(state, metadata)
    except (SafetensorError, OSError):
        return False


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of what a file states and holds, in fp32, but for `_DIGEST_KEY` itself and what `save_tensors` adds."""
    stated = {key: value for key, value in metadata.items() if key not in (_DIGEST_KEY, "format")}
    digest = hashlib.sha256(json.dumps([stated, sorted(tensors)], sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu()
        digest.update(repr((value.dtype, value.shape)).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _bytes(out: Path) -> int:
    return sum(file.stat().st_size for file in ([out] if out.is_file() else out.rglob("*")) if file.is_file())
