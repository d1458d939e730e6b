"""Adapter files in every form that `export` writes: recognised, and brought to PEFT's names and one `LoraConfig`.

| form | what lies there | names of tensors |
| --- | --- | --- |
| peft | a folder with adapter_config.json, adapter_model.safetensors | `base_model.model.<module>.lora_A.weight` |
| diffusers | pytorch_lora_weights.safetensors, its config in the header | `transformer.<module>.lora_A.weight` |
| kohya | one file | `lora_unet_<module, dots as underscores>.lora_down.weight`, `.alpha` |
| creatilayout | pytorch_lora_weights.safetensors, its config in the header | `transformer.<CreatiLayout's module>.lora_A.weight` |

Nothing of an adapter file is trusted: numbers are checked here, and its regular expressions never reach PEFT.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import peft
import regex
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmdit_lora.errors import InputError, clip
from mmdit_lora.files import exists, nearest, require_file
from mmdit_lora.hub import index_file
from mmdit_lora.json_files import parse_object, read_object
from mmdit_lora.lora.style import warn_without_alpha
from mmdit_lora.models.adapter_layers import own_modules
from mmdit_lora.models.creatilayout import to_creatilayout, variant_of_model
from mmdit_lora.models.weight_files import PICKLES, check_tensor_count

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = LORA_WEIGHT_NAME_SAFE
KEY_PREFIX = "base_model.model."  # PEFT loads keys without it as nothing, with a mere warning
KOHYA_PREFIX = "lora_unet_"
HEADER_KEY = "mmdit_lora"

MAX_RANK = 16_384
MAX_ALPHA = 1e6
_MAX_PATTERNS = 4_096
_MATCHING_SECONDS = 2.0
_SWITCHES = ("use_rslora", "use_dora", "lora_bias")
# Fields of PEFT's config that say what a plain LoRA is; `bias` is refused by its value. Any other must be at its default.
_PLAIN_FIELDS = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    ]
)
_OUR_PREFIX = "transformer."
_CREATILAYOUT_MARK = re.compile(r"\b(?:ff_bbox|bbox_\w+|position_net)\.")
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")  # a pattern that is a name, or the end of one


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it is stored, whatever its form.

    Args:
        path: the file of its tensors.
        form: "peft", "diffusers", "kohya" or "creatilayout".
        tensors: by PEFT's names, `base_model.model.<module>.lora_A.weight`.
        config: as stored, or, where that states targets or patterns by regular expressions, module by module.
        header: the metadata that `save_adapter` wrote; empty for an adapter of another tool.
    """

    path: Path
    form: str
    tensors: dict[str, Tensor]
    config: peft.LoraConfig
    header: dict[str, Any]

    @property
    def modules(self) -> list[str]:
        """The linears that it adapts, sorted."""
        return sorted(name.removeprefix(KEY_PREFIX) for name in _ranks(self.tensors))


def read_adapter(source: str | Path, model: nn.Module) -> StoredAdapter:
    """Read an adapter file or folder in any form.

    Args:
        model: the transformer that it is for; some forms name modules in ways that only it resolves. Not changed.

    Raises:
        InputError: there is no adapter, it is damaged or a pickle, a number in it is not finite or absurd, or it is of a form
            whose names stand for no module of `model`.
    """
    path = adapter_file(source)
    tensors, metadata = _read(path)
    header = _json_object(metadata.get(HEADER_KEY, "{}"), HEADER_KEY, path)
    form = _form(tensors, path)
    if form == "peft":
        config = read_adapter_config(path.parent)
        return StoredAdapter(path, form, tensors, _resolved(config, tensors, path.parent / CONFIG_FILE), header)
    if form == "kohya":
        state, config = _from_kohya(tensors, model, path)
    else:
        prefix = _OUR_PREFIX if any(name.startswith(_OUR_PREFIX) for name in tensors) else ""
        foreign = [name for name in tensors if not name.startswith(prefix)]
        if foreign:
            raise InputError(
                f"holds more than an adapter of the transformer: {clip(foreign[0], 100)}, ...",
                location=str(path),
                hint="load it with pipe.load_lora_weights",
            )
        state = {name.removeprefix(prefix): value for name, value in tensors.items()}
        stated = _json_object(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"), LORA_ADAPTER_METADATA_KEY, path)
        stated = {key.removeprefix(prefix): value for key, value in stated.items()}
        if form == "creatilayout":
            state, stated = _from_creatilayout(state, stated, model, path)
        if stated and "r" not in stated:
            raise InputError(f"{LORA_ADAPTER_METADATA_KEY} in its header states no rank (r)", location=str(path))
        if not stated:
            warn_without_alpha(clip(path, 300), len(_ranks(state)))
        config = _config_of(_ranks(state), {}) if not stated else _valid_config(stated, str(path))
    tensors = {KEY_PREFIX + name: value for name, value in state.items()}
    return StoredAdapter(path, form, tensors, _resolved(config, tensors, path), header)


def adapter_file(source: str | Path) -> Path:
    """The file that holds the tensors of an adapter: `source` itself, or the one in the folder `source`.

    Raises:
        InputError: there is none, or it is a pickle.
    """
    path, hint = Path(source), "give an adapter folder or file as `train` or `export` writes it"
    if not exists(path):
        near = nearest(path)
        raise InputError("no such file or folder", location=str(source), hint=f"did you mean {near}?" if near else hint)
    if path.is_dir():
        named = [path / name for name in (WEIGHTS_FILE, DIFFUSERS_FILE) if (path / name).exists()]
        alone, pickles = sorted(path.glob("*.safetensors")), sorted(f for f in path.iterdir() if f.suffix in PICKLES)
        if not named and not alone and not pickles and (path / CONFIG_FILE).exists():
            raise InputError(
                "no such file", location=str(path / WEIGHTS_FILE), hint="the folder is not whole: get it anew"
            )
        found = named or (alone if len(alone) == 1 else pickles)
        if not found:
            raise InputError(
                f"holds no adapter: no {CONFIG_FILE} beside {WEIGHTS_FILE}, no {DIFFUSERS_FILE}, "
                + ("no .safetensors file" if not alone else f"and {len(alone)} .safetensors files"),
                location=str(source),
                hint="this is a base: give it as --base" if index_file(path) is not None else hint,
            )
        path = found[0]
    if path.suffix in PICKLES:
        raise InputError("is a pickle, which may run code", location=str(path), hint="get it as .safetensors")
    return require_file(path, what="adapter file")


def is_layout_adapter_file(path: Path) -> bool:
    """Whether a safetensors file is an adapter of a layout stream alone, in any form; False where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError, ValueError):
        return False
    if any(name.startswith(("text_encoder", "lora_te")) for name in names):
        return False
    return any(("layout_" in name or _CREATILAYOUT_MARK.search(name)) and "lora" in name for name in names)


def read_adapter_header(source: str | Path) -> dict[str, Any]:
    """The `mmdit_lora` metadata of an adapter; empty for an adapter that another tool wrote.

    Raises:
        InputError: no such file, no safetensors file, or its metadata is not a JSON object.
    """
    path = adapter_file(source)
    return _json_object(_read(path, tensors=False)[1].get(HEADER_KEY, "{}"), HEADER_KEY, path)


def read_adapter_config(folder: str | Path) -> peft.LoraConfig:
    """The `LoraConfig` of a PEFT folder, as it is stored.

    Raises:
        InputError: no such file, not JSON, or not the config of a LoRA that can be applied.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.exists():
        raise InputError(
            f"no {CONFIG_FILE}", location=str(folder), hint="give an adapter folder as `mmdit-lora train` writes it"
        )
    data = read_object(path, what="adapter config", limit=16 * 2**20, finite=False)  # judged key by key
    return _valid_config({"peft_type": None, **data}, str(path))


def _read(path: Path, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            check_tensor_count(len(file.keys()), path)
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 - no mapping
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"is not a safetensors file: {error}", location=str(path), hint="the file is damaged: get it anew"
        ) from None
    return state, metadata


def _json_object(text: str, key: str, path: Path) -> dict[str, Any]:
    return parse_object(text, location=f"{path}: its header {key!r}", finite=False)


def _form(names: Iterable[str], path: Path) -> str:
    names = list(names)
    if any(name.startswith(KEY_PREFIX) for name in names) or (path.parent / CONFIG_FILE).exists():
        return "peft"
    if any(name.startswith("lora_") and ".lora_down." in name for name in names):
        return "kohya"
    if any(_CREATILAYOUT_MARK.search(name) for name in names):
        return "creatilayout"
    if any(".lora_A." in name for name in names):
        return "diffusers"
    raise InputError(
        "holds no adapter in a form that is known here: " + (clip(names[0], 100) if names else "it is empty"),
        location=str(path),
        hint="give an adapter folder or file as `train` or `export` writes it; style LoRAs go to pipe.load_lora_weights",
    )


# -- configs


def _valid_config(data: Mapping[str, Any], location: str) -> peft.LoraConfig:
    """PEFT's config of these entries; those that it has no field for are left out.

    Raises:
        InputError: PEFT takes no such config, or an entry cannot be applied.
    """
    try:
        entries = _plain_entries(data, location)
        for kind in ("rank_pattern", "alpha_pattern"):
            patterns = entries[kind] = entries.get(kind) or {}
            if not isinstance(patterns, dict) or not all(isinstance(key, str) for key in patterns):
                raise ValueError(f"{kind} is no object of names and values")
            if len(patterns) > _MAX_PATTERNS:
                raise ValueError(f"{kind} has {len(patterns):,} entries; {_MAX_PATTERNS:,} are read at most")
        config = peft.LoraConfig(**entries)
        _check_values(config)
    except InputError:
        raise
    except Exception as error:  # whatever PEFT makes of a config that is not one
        raise InputError(f"is not a valid LoraConfig: {error}", location=location) from None
    return config


def _check_values(config: peft.LoraConfig) -> None:
    """Raises ValueError: a value that PEFT takes, and that is not of its kind."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and abs(value) <= MAX_ALPHA  # not so NaN

    def are(kind: type, value: Any) -> bool:
        one = value is None or type(value) is kind
        return one or (isinstance(value, list | set | tuple) and all(type(each) is kind for each in value))

    def entries(kind: str) -> list[tuple[str, Any]]:
        return [(f"{kind}[{clip(repr(key), 60)}]", value) for key, value in (getattr(config, kind) or {}).items()]

    rank, alpha = f"a whole number from 1 to {MAX_RANK:,}", f"a finite number up to {MAX_ALPHA:,.0f}"
    targets, dropout = config.target_modules, config.lora_dropout
    if isinstance(targets, Collection) and not isinstance(targets, str) and len(targets) > _MAX_PATTERNS:
        raise ValueError(f"target_modules has {len(targets):,} entries; {_MAX_PATTERNS:,} are read at most")
    for name, value, kind, fits in (
        *((n, v, rank, type(v) is int and 0 < v <= MAX_RANK) for n, v in [("r", config.r), *entries("rank_pattern")]),
        *((n, v, alpha, is_number(v)) for n, v in [("lora_alpha", config.lora_alpha), *entries("alpha_pattern")]),
        ("lora_dropout", dropout, "a share from 0 to below 1", is_number(dropout) and 0 <= dropout < 1),
        ("layers_to_transform", config.layers_to_transform, "numbers of layers", are(int, config.layers_to_transform)),
        *((n, v := getattr(config, n), "true or false", isinstance(v, bool)) for n in _SWITCHES),
    ):
        if not fits:
            raise ValueError(f"{name} is {clip(repr(value), 60)}, not {kind}")
    if config.lora_alpha == 0 and not any((config.alpha_pattern or {}).values()):  # one of a few may be switched off
        raise ValueError("lora_alpha is 0, with which the adapter does nothing")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        if not are(str, getattr(config, name)):
            raise ValueError(f"{name} are no names")


def _plain_entries(data: Mapping[str, Any], location: str) -> dict[str, Any]:
    """What PEFT may see of a stored config: the fields of a plain LoRA.

    Raises:
        InputError: it is of another method, or a field beyond these is set.
    """
    kind = data.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"is not the config of a LoRA: peft_type is {clip(repr(kind), 100)}", location=location)
    entries = {}
    for field in fields(peft.LoraConfig):
        if field.name not in data:
            continue
        value, default = data[field.name], field.default
        if field.name in _PLAIN_FIELDS:
            entries[field.name] = value
        elif not (
            value is None or value is False or value in ([], {}) or (type(value), value) == (type(default), default)
        ):
            raise InputError(
                f"{field.name} is set",
                location=location,
                hint=f"leave {field.name} out: only LoRA on linear layers is part of an adapter",
            )
    return entries


def _config_of(ranks: Mapping[str, int], alphas: Mapping[str, float], **more: Any) -> peft.LoraConfig:
    """A config that states rank and alpha of every module by its full name; without an alpha it is the rank."""
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    strengths = {name: alphas.get(name, each) for name, each in ranks.items()}
    alpha = Counter(strengths.values()).most_common(1)[0][0] if ranks else 1
    entries = {
        **more,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "rank_pattern": {_exact(name): each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {_exact(name): each for name, each in strengths.items() if each != alpha},
    }
    return _valid_config(entries, "the adapter")


def _exact(name: str) -> str:
    """A full module name as a pattern of PEFT, which matches the ends of names."""
    return f"^{re.escape(name)}"


def _ranks(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Module -> its rank."""
    return {
        name.removesuffix(".lora_A.weight"): value.shape[0]
        for name, value in state.items()
        if name.endswith(".lora_A.weight") and value.ndim
    }


def _resolved(config: peft.LoraConfig, tensors: Mapping[str, Tensor], location: Path) -> peft.LoraConfig:
    """The config without regular expressions: what they match is told by the tensors' names.

    A config that states plain names is returned as it is. PEFT would try a file's expressions on every module of the
    model, and one that backtracks takes minutes.

    Raises:
        InputError: a pattern is no regular expression, takes too long to match, or leaves out a linear that the tensors adapt.
    """
    ranks = {name.removeprefix(KEY_PREFIX): rank for name, rank in _ranks(tensors).items()}
    if len(ranks) > _MAX_PATTERNS:
        raise InputError(f"adapts {len(ranks):,} linears; {_MAX_PATTERNS:,} are read at most", location=str(location))
    match = _Matcher(str(location))
    _require_own_targets(config, ranks, match)
    by_expression = isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str)
    if (by_expression or config.layers_to_transform is not None or config.layers_pattern) and ranks:
        config.target_modules = sorted(ranks)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for kind in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, kind) or {}
        if len(patterns) > 512 or not all(_PLAIN.fullmatch(pattern) for pattern in patterns):
            setattr(config, kind, _by_module(patterns, ranks, kind, match))
    return config


class _Matcher:
    """A file's regular expressions on names of modules, within `_MATCHING_SECONDS` for all of them."""

    def __init__(self, location: str) -> None:
        self.location, self.seconds = location, _MATCHING_SECONDS

    def __call__(self, pattern: str, name: str, kind: str, *, whole: bool = False) -> Any:
        """The match of the end of a name, or of the `whole` name, as in PEFT; None where there is none.

        Args:
            kind: what the pattern is in the config, for messages.

        Raises:
            InputError: the pattern is no regular expression, is longer than anybody writes one, or no time is left.
        """
        if len(pattern) > 1_000:
            raise self._refusal(pattern, kind, "is longer than 1,000 characters")
        before = time.monotonic()
        try:
            regex.compile(pattern)  # alone: `a)(b` is none
            match = regex.fullmatch if whole else regex.match
            return match(pattern if whole else rf"(.*\.)?({pattern})$", name, timeout=max(self.seconds, 1e-3))
        except TimeoutError:
            raise self._refusal(pattern, kind, "takes too long to match") from None
        except (regex.error, RecursionError, MemoryError, OverflowError) as error:
            raise self._refusal(pattern, kind, f"is no regular expression: {error}") from None
        finally:
            self.seconds -= time.monotonic() - before

    def _refusal(self, pattern: str, kind: str, what: str) -> InputError:
        return InputError(
            f"{kind} {clip(repr(pattern), 100)} {what}", location=self.location, hint="state module names"
        )


def _require_own_targets(config: peft.LoraConfig, names: Collection[str], match: _Matcher) -> None:
    """Whether what the config selects by expression or by layer, which is all that PEFT goes by, is all that has tensors.

    Raises:
        InputError: it is not; PEFT would load a part, without a word.
    """

    def contradiction(what: str, name: str) -> InputError:
        return InputError(
            f"{what} {clip(name, 100)}, which the adapter holds: PEFT would not load it",
            location=match.location,
            hint="state the names of the modules in target_modules; `export --to peft` writes them",
        )

    for kind, wanted in (("target_modules", True), ("exclude_modules", False)):
        pattern = getattr(config, kind)
        if not isinstance(pattern, str) or not pattern or (wanted and pattern.lower() == "all-linear"):
            continue
        for name in names:
            if bool(match(pattern, name, kind, whole=True)) != wanted:
                how = "does not match" if wanted else "leaves out"
                raise contradiction(f"{kind} {clip(repr(pattern), 100)} {how}", name)
    layers, patterns = config.layers_to_transform, config.layers_pattern or [r"[^.]*"]
    if layers is None or isinstance(config.target_modules, str):
        return
    for name in set(names) - set(config.target_modules or []):  # PEFT takes a module that is named whole from any layer
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = match(rf"(?:.*?\.)?{pattern}\.(?P<layer>\d+)\..*", name, "layers_pattern", whole=True)
            if found:
                break
        if not found or int(found["layer"]) not in ([layers] if isinstance(layers, int) else layers):
            raise contradiction(f"layers_to_transform {clip(repr(layers), 100)} leaves out", name)


def _by_module(patterns: Mapping[str, Any], names: Collection[str], kind: str, match: _Matcher) -> dict[str, Any]:
    """For every module that a pattern matches, its value by the full name; the first pattern counts, as in PEFT."""
    found: dict[str, Any] = {}
    for pattern, value in patterns.items():
        if _PLAIN.fullmatch(pattern):
            literal = pattern.replace("\\.", ".").removesuffix("$")
            bare = literal.removeprefix("^")
            hits = [name for name in names if name == bare or (bare == literal and name.endswith(f".{bare}"))]
        else:
            hits = [name for name in names if match(pattern, name, kind)]
        if not hits:
            what = f"{kind} {clip(repr(pattern), 100)} matches no module of the adapter"
            raise InputError(what, location=match.location)
        for name in hits:
            found.setdefault(name, value)
    return {_exact(name): value for name, value in found.items()}


# -- names of others


def _from_kohya(
    tensors: Mapping[str, Tensor], model: nn.Module, path: Path
) -> tuple[dict[str, Tensor], peft.LoraConfig]:
    """Tensors named `lora_unet_<module, dots as underscores>.{lora_down.weight, lora_up.weight, alpha}` as PEFT has them."""
    modules = {name.replace(".", "_"): name for name, _ in own_modules(model)}
    leaves = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    state: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, value in tensors.items():
        flat, _, leaf = key.partition(".")
        # Before 0.2 these files had no `unet_`, which is what every reader of them looks for.
        name = modules.get(flat.removeprefix(KOHYA_PREFIX)) or modules.get(flat.removeprefix("lora_"))
        if name is None:
            raise InputError(
                f"{clip(repr(flat), 100)} stands for no module of this base",
                location=str(path),
                hint="give the base that the adapter was trained on; style LoRAs go to pipe.load_lora_weights",
            )
        if leaf == "alpha" and value.numel() == 1:
            alphas[name] = float(value.item())
        elif leaf in leaves:
            state[f"{name}.{leaves[leaf]}"] = value
        else:
            raise InputError(f"{clip(key, 100)} is no part of a plain LoRA", location=str(path))
    try:
        return state, _config_of(_ranks(state), alphas)
    except InputError as error:
        raise InputError(error.what, location=str(path), hint=error.hint) from None


def _from_creatilayout(
    state: Mapping[str, Tensor], stated: Mapping[str, Any], model: nn.Module, path: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config under CreatiLayout's module names as PEFT has them on our modules."""
    try:
        variant = variant_of_model(model)
    except InputError as error:
        raise error.at(f"{path} is for CreatiLayout's stream") from None
    config = _valid_config(stated, str(path))
    patterns = {"rank_pattern": config.rank_pattern or {}, "alpha_pattern": config.alpha_pattern or {}}
    ours: dict[str, tuple[str, int]] = {}  # their name -> ours, and the width of its input
    for name, module in own_modules(model):
        # Of the two that share a fused projection, the MLP's part is the one that can carry LoRA.
        fused = name.startswith("single") and ".to_out" in name
        if isinstance(module, nn.Linear) and "layout" in name and not fused:
            ours[to_creatilayout(name, variant)] = name, module.in_features
    theirs = {name.partition(".lora_")[0] for name in state}
    theirs |= {name.lstrip("^") for each in patterns.values() for name in each}
    if unknown := sorted(theirs - ours.keys()):
        raise InputError(
            f"{clip(repr(unknown[0]), 100)} stands for no module of this base",
            location=str(path),
            hint="give the base that the adapter was trained on",
        )
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        their_name, _, leaf = key.partition(".lora_")
        name, width = ours[their_name]
        # What a fused projection reads before the MLP's columns is the attention's, which the LoRA leaves alone.
        renamed[f"{name}.lora_{leaf}"] = value[:, -width:].contiguous() if leaf == "A.weight" else value
    if not stated:
        return renamed, {}
    by_name = {
        kind: {_exact(ours[n.lstrip("^")][0]): value for n, value in each.items()} for kind, each in patterns.items()
    }
    return renamed, {**stated, **by_name, "target_modules": sorted(_ranks(renamed))}
