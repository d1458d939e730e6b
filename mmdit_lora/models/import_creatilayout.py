"""CreatiLayout's published weights as a base of ours."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from mmdit_lora.errors import InputError, counted
from mmdit_lora.files import write_json
from mmdit_lora.hub import local_copy
from mmdit_lora.json_files import read_object
from mmdit_lora.models.creatilayout import VARIANTS, Recipe, recipes, variant_of
from mmdit_lora.models.families import FAMILIES
from mmdit_lora.models.weight_files import load_tensors
from mmdit_lora.outputs import check_new_folder, new_folder

# Of a pipeline's repository: not the single files beside its parts, which hold the same weights again.
_COMPONENTS = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MARK = "creatilayout.json"  # what an import leaves, and is known by


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Args:
        variant: a key of `creatilayout.VARIANTS`.
        stream_tensors, stream_params: of the layout stream that was written.
        base_tensors_from: "weights" where the imported file holds the whole transformer, else "base".
        shards: files that the transformer's weights went to.
    """

    variant: str
    out: str
    stream_tensors: int
    stream_params: int
    base_tensors_from: str
    dtype: str
    shards: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def import_creatilayout(
    base: str | Path,
    weights: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> ImportReport:
    """Write `out`, a folder of ours that computes what CreatiLayout's class does with `weights`.

    Args:
        base: folder or hub id of the base: a pipeline folder, of which everything else is copied, or one with `transformer/`
            only.
        weights: one of its safetensors files, or a folder (one file, or shards with their index), or either in a repository
            of the hub, OWNER/NAME/PATH; the stream alone or the whole transformer, whose own tensors then take the place of
            the base's.
        dtype: of what is written; None = as stored. Sums of the low-rank variant are rounded to it: with fp32 none is lost.
        max_shard_bytes: size of the files that are written, and about what memory is needed.

    Raises:
        InputError: what is given is not that: names or shapes that are missing, unexpected or wrong are listed. Nothing
            is written then.
    """
    inputs = {"--base": base, "--weights": weights}
    out = check_new_folder(out, verb="import", inputs=inputs)
    weights = local_copy(weights, location="--weights", allow=_WEIGHTS, ignore=("*/*",))
    base = local_copy(base, location="--base", allow=_COMPONENTS, ignore=("*.fp16.*", "*.fp16-*"))
    folder = base / "transformer"
    if not (folder / "config.json").is_file():
        raise InputError(
            "has no transformer/config.json", location=f"--base {base}", hint="give a diffusers folder of the base"
        )
    config = read_object(folder / "config.json")
    index = read_object(base / "model_index.json") if (base / "model_index.json").is_file() else None
    theirs, own = load_tensors(weights), load_tensors(folder)
    key = variant_of(theirs)
    if key is None:
        raise InputError(
            "holds no layout stream of CreatiLayout", location=str(weights), hint="give its SiamLayout_* weights"
        )
    family = FAMILIES[VARIANTS[key].family]
    if config.get("_class_name") not in (family.stock_class, family.transformer.__name__):
        raise InputError(
            f"hold a stream for {family.stock_class}, and the base is a {config.get('_class_name')}",
            location=str(weights),
            hint="give the base that this variant was trained on",
        )
    changes = dict(VARIANTS[key].config)
    if VARIANTS[key].low_rank:
        changes["layout_mlp_dim"] = _joined_width({**own, **theirs}, weights)
    transformer: Any = family.transformer
    try:
        with torch.device("meta"):
            model = transformer.from_config({**config, **changes})
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise InputError(f"describes no transformer: {error}", location=str(folder / "config.json")) from None
    expected: dict[str, Tensor] = dict(model.state_dict())
    stream = [name for name in expected if "layout" in name]
    base_names = expected.keys() - set(stream)
    plan = {name: Recipe((name,)) for name in base_names} | recipes(stream, key)
    # A file that holds any of the base's tensors is the whole transformer, and then none is taken from the base.
    whole = bool(base_names & theirs.keys())
    given = theirs if whole else theirs | {name: own[name] for name in base_names & own.keys()}
    made = _check(plan, given, expected, theirs, location=f"{weights} on {folder}")
    # Sums are made in fp32 and stored as the base's tensor that they are added to.
    made = {name: value.to(dtype or given[plan[name].sources[0]].dtype) for name, value in made.items()}
    with new_folder(out, verb="import", inputs=inputs) as temporary:

        def not_copied(place: str, names: list[str]) -> list[str]:
            return [n for n in names if n in ("transformer", MARK) or n.startswith(".")] if Path(place) == base else []

        shutil.copytree(base, temporary, ignore=not_copied, dirs_exist_ok=True)
        if index is not None:
            name = str(index.get("_class_name", ""))
            index["_class_name"] = name if name.startswith("Layout") else f"Layout{name}"
            index["transformer"] = [type(model).__module__, type(model).__name__]
            write_json(temporary / "model_index.json", index)
        (temporary / "transformer").mkdir()
        model.save_config(temporary / "transformer")
        shards = _write(plan, given, made, temporary / "transformer", max_shard_bytes, f"{weights} on {folder}")
        report = ImportReport(
            variant=key,
            out=str(out),
            stream_tensors=len(stream),
            stream_params=sum(expected[name].numel() for name in stream),
            base_tensors_from="weights" if whole else "base",
            dtype=str(made[stream[0]].dtype).removeprefix("torch."),
            shards=shards,
        )
        write_json(temporary / MARK, {k: v for k, v in report.to_dict().items() if k != "out"})
    return report


def _joined_width(tensors: Mapping[str, Tensor], weights: Path) -> int:
    """Hidden width of the text's MLP and the low-rank one beside it, together."""
    names = ("transformer_blocks.0.ff_context.net.0.proj.weight", "transformer_blocks.0.ff_context_lora.0.up.weight")
    if missing := [name for name in names if name not in tensors]:
        raise InputError(f"1 missing: {missing[0]}", location=str(weights))
    return sum(tensors[name].shape[0] for name in names)


def _check(
    plan: Mapping[str, Recipe],
    given: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    *,
    location: str,
) -> dict[str, Tensor]:
    """What each tensor will be, on the meta device.

    Raises:
        InputError: with all that is missing, unexpected or misshapen.
    """
    needed = {source for recipe in plan.values() for source in recipe.sources}
    made: dict[str, Tensor] = {}
    misshapen = []
    for name, recipe in plan.items():
        sources = {source: given[source].to("meta") for source in recipe.sources if source in given}
        if len(sources) < len(recipe.sources):
            continue
        try:
            made[name] = recipe(sources)
            fits = made[name].shape == expected[name].shape
        except (RuntimeError, IndexError):
            fits = False
        if not fits:
            shapes = " and ".join(f"{source} {tuple(value.shape)}" for source, value in sources.items())
            misshapen.append(f"{shapes} for {tuple(expected[name].shape)}")
    faults = {
        "missing": sorted(needed - given.keys()),
        "unexpected": sorted(theirs.keys() - needed),
        "misshapen": misshapen,
    }
    if any(faults.values()):
        raise InputError(
            f"do not fit: {counted(faults)}",
            location=location,
            hint="give the weights and the base that belong together",
        )
    return made


def _write(
    plan: Mapping[str, Recipe],
    given: Mapping[str, Tensor],
    made: Mapping[str, Tensor],
    folder: Path,
    max_shard_bytes: int,
    location: str,
) -> int:
    """The transformer's weights, one shard in memory at a time. Returns the number of files."""
    split = split_torch_state_dict_into_shards(
        dict(made),
        filename_pattern=SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = plan[name](given).to(made[name].dtype).contiguous()
            if not all(extreme.isfinite() for extreme in tensors[name].aminmax()):  # NaN is both; no copy is made
                raise InputError(
                    f"{name} would hold numbers that are not finite in {str(made[name].dtype).removeprefix('torch.')}",
                    location=location,
                    hint="import as float32 or bfloat16, which hold larger numbers, or get the file anew",
                )
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{SAFETENSORS_WEIGHTS_NAME}.index.json", index)
    return len(split.filename_to_tensors)
