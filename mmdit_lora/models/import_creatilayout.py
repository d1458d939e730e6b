"""CreatiLayout's published weights as a base of ours: tensor by tensor, shard by shard, so that memory stays near one shard."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from mmdit_lora.errors import InputError, listed
from mmdit_lora.files import write_json
from mmdit_lora.hub import local_copy
from mmdit_lora.json_files import read_object
from mmdit_lora.models.creatilayout import VARIANTS, Recipe, recipes, variant_of
from mmdit_lora.models.families import FAMILIES
from mmdit_lora.models.tensor_files import TensorFiles
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
    folder, config = _base_transformer(base)
    index = read_object(base / "model_index.json") if (base / "model_index.json").is_file() else None
    with ExitStack() as stack:
        theirs, own = TensorFiles(weights, stack), TensorFiles(folder, stack)
        key = variant_of(theirs.names())
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
            changes["layout_mlp_dim"] = _joined_width(theirs, own)
        transformer: Any = family.transformer
        try:
            with torch.device("meta"):
                model = transformer.from_config({**config, **changes})
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise InputError(f"describes no transformer: {error}", location=str(folder / "config.json")) from None
        expected: dict[str, Tensor] = dict(model.state_dict())
        stream = [name for name in expected if "layout" in name]
        plan = {name: Recipe((name,)) for name in expected if "layout" not in name} | recipes(stream, key)
        whole = any(name in theirs for name in expected if "layout" not in name)
        sources = _sources(plan, theirs, own, whole=whole)
        sizes = _check(plan, sources, expected, theirs, own)
        # Sums are made in fp32 and stored as the base's tensor that they are added to.
        dtypes = {n: dtype or sources[r.sources[0]].empty(r.sources[0]).dtype for n, r in plan.items()}
        with new_folder(out, verb="import", inputs=inputs) as temporary:
            _copy_components(base, temporary)
            if index is not None:
                write_json(temporary / "model_index.json", {**index, **_named_in_index(index, model)})
            (temporary / "transformer").mkdir()
            model.save_config(temporary / "transformer")
            shards = _write(plan, sources, sizes, dtypes, temporary / "transformer", max_shard_bytes)
            report = ImportReport(
                variant=key,
                out=str(out),
                stream_tensors=len(stream),
                stream_params=sum(expected[name].numel() for name in stream),
                base_tensors_from="weights" if whole else "base",
                dtype=str(dtypes[stream[0]]).removeprefix("torch."),
                shards=shards,
            )
            write_json(temporary / MARK, {k: v for k, v in report.to_dict().items() if k != "out"})
    return report


def _base_transformer(base: Path) -> tuple[Path, dict[str, Any]]:
    """Folder and config of the base's transformer."""
    folder = base / "transformer"
    if not (folder / "config.json").is_file():
        raise InputError(
            "has no transformer/config.json", location=f"--base {base}", hint="give a diffusers folder of the base"
        )
    return folder, read_object(folder / "config.json")


def _joined_width(theirs: TensorFiles, own: TensorFiles) -> int:
    """Hidden width of the text's MLP and the low-rank one beside it, together."""
    names = ("transformer_blocks.0.ff_context.net.0.proj.weight", "transformer_blocks.0.ff_context_lora.0.up.weight")
    found = [(theirs if name in theirs else own) for name in names]
    missing = [name for name, files in zip(names, found, strict=True) if name not in files]
    if missing:
        raise InputError(f"1 missing: {missing[0]}", location=str(theirs.path))
    return sum(files.empty(name).shape[0] for name, files in zip(names, found, strict=True))


def _sources(
    plan: Mapping[str, Recipe], theirs: TensorFiles, own: TensorFiles, *, whole: bool
) -> dict[str, TensorFiles]:
    """Where each source tensor is read: the stream's from `theirs`, the base's too where it holds the whole transformer."""
    base_names = {name for name in plan if "layout" not in name}
    needed = {source for recipe in plan.values() for source in recipe.sources}
    return {name: own if name in base_names and not whole else theirs for name in needed}


def _check(
    plan: Mapping[str, Recipe],
    sources: Mapping[str, TensorFiles],
    expected: Mapping[str, Tensor],
    theirs: TensorFiles,
    own: TensorFiles,
) -> dict[str, Tensor]:
    """What each tensor will be, on the meta device.

    Raises:
        InputError: with all that is missing, unexpected or misshapen.
    """
    missing = sorted(name for name, files in sources.items() if name not in files)
    unexpected = sorted(theirs.names() - sources.keys())
    sizes: dict[str, Tensor] = {}
    misshapen = []
    for name, recipe in plan.items():
        if any(source in missing for source in recipe.sources):
            continue
        given = [sources[source].empty(source) for source in recipe.sources]
        try:
            sizes[name] = recipe.make(*given) if recipe.make else given[0]
            fits = sizes[name].shape == expected[name].shape
        except (RuntimeError, IndexError):
            fits = False
        if not fits:
            shapes = " and ".join(f"{source} {tuple(g.shape)}" for source, g in zip(recipe.sources, given, strict=True))
            misshapen.append(f"{shapes} for {tuple(expected[name].shape)}")
    faults = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(faults.values()):
        raise InputError(
            "do not fit: "
            + "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in faults.items() if names),
            location=f"{theirs.path} on {own.path}",
            hint="give the weights and the base that belong together",
        )
    return sizes


def _write(
    plan: Mapping[str, Recipe],
    sources: Mapping[str, TensorFiles],
    sizes: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    folder: Path,
    max_shard_bytes: int,
) -> int:
    """The transformer's weights, one shard in memory at a time. Returns the number of files."""
    split = split_state_dict_into_shards_factory(
        {name: sizes[name].numel() * dtypes[name].itemsize for name in plan},
        get_storage_size=lambda size: size,
        filename_pattern=SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            given = [sources[source].get(source) for source in plan[name].sources]
            made = plan[name].make
            tensors[name] = (made(*given) if made else given[0]).to(dtypes[name]).contiguous()
            if not all(extreme.isfinite() for extreme in tensors[name].aminmax()):  # NaN is both; no copy is made
                raise InputError(
                    f"{name} would hold numbers that are not finite in {str(dtypes[name]).removeprefix('torch.')}",
                    location=" and ".join(sorted({str(sources[source].path) for source in plan[name].sources})),
                    hint="import as float32 or bfloat16, which hold larger numbers, or get the file anew",
                )
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{SAFETENSORS_WEIGHTS_NAME}.index.json", index)
    return len(split.filename_to_tensors)


def _copy_components(base: Path, out: Path) -> None:
    """Everything of the base but its transformer."""
    for item in base.iterdir():
        if item.name in ("transformer", MARK) or item.name.startswith("."):
            continue
        if item.is_dir():
            shutil.copytree(item, out / item.name)
        else:
            shutil.copy2(item, out / item.name)


def _named_in_index(index: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """What a model_index.json says of a pipeline with `model`, so that ours opens it."""
    name = str(index.get("_class_name", ""))
    return {
        "_class_name": name if name.startswith("Layout") else f"Layout{name}",
        "transformer": [type(model).__module__, type(model).__name__],
    }
