"""Style LoRA files of other tools as LoRA on our modules: the same change of every weight, or a refusal that names what stops it.

Every method that adds to a weight is a product of two factors: LoRA as it stands; LoHa by the products of its columns and rows;
LoKr by Kronecker products of factors; a full difference times an identity. So one kind of layer carries them all, and
`set_adapters`, `fuse_lora` and `delete_adapters` are exact for all. DoRA (`dora_scale`) is computed here against the base's
weights, as LyCORIS and OneTrainer train it, and becomes a full difference, too; only PEFT's own DoRA stays a DoRA. A full
difference takes min(in, out) ranks: about twice the memory of the weights that it changes.

Scales are ComfyUI's (comfy/weight_adapter/ at 0323d87, 17adbb5, 179c2d3): alpha / rank, without alpha 1; LoKr of two whole factors
has none. In one thing ComfyUI differs from the trainers, and is not followed: for a `dora_scale` of output rows it divides by the
norms of the base's rows, not of the changed weight's.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmdit_lora.config.ranges import FINITE, MAX_UPDATE
from mmdit_lora.errors import InputError, clip, listed
from mmdit_lora.lora.inject import largest_update
from mmdit_lora.lora.style_names import EMBEDDINGS, LEAVES, REFUSED, FamilyNames, Place, Places, split_key

logger = logging.getLogger("mmdit_lora")

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)  # sd-scripts writes an integer alpha as one
_ADDED = {"alpha", "bias", "up_bias", "dora_scale", "magnitude"}  # beside any method's own tensors
# Method: tensors that it needs, tensors that it may have.
_METHODS: dict[str, tuple[set[str], set[str]]] = {
    "LoRA": ({"down", "up"}, {"mid"}),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}),
    "LoKr": (set(), {f"lokr_{name}" for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")}),
    "a full difference": ({"diff"}, set()),
    "a difference of the bias": ({"bias"}, set()),
}


@dataclass(frozen=True)
class StyleReport:
    """What `load_lora_weights` did with a file.

    Args:
        adapter_name: under which it acts.
        used: component -> modules of ours that carry it, in the file's order.
        ignored: reason -> modules or keys of the file that were left out.
        full_rank: how many of the modules carry a full difference.
        bytes: of the adapter's weights in fp32.
    """

    adapter_name: str
    used: dict[str, list[str]]
    ignored: dict[str, list[str]] = field(default_factory=dict)
    full_rank: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        used = ", ".join(f"{len(modules)} modules of {component}" for component, modules in self.used.items())
        text = f"style {clip(repr(self.adapter_name))} acts on {used} ({self.bytes / 2**20:.1f} MiB in fp32)"
        if self.full_rank:
            text += f"; {self.full_rank} of them carry a full difference"
        for reason, names in self.ignored.items():
            text += f"; left out: {len(names)} ({reason})"
        return text


@dataclass(frozen=True)
class StylePart:
    """The part of a file for one component.

    Args:
        config: for PEFT; no dropout, exact ranks and alphas.
        state: `<module>.lora_A.weight` (r, in), `<module>.lora_B.weight` (out, r), ... in fp32, no memory shared with the file.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]


@dataclass
class _Delta:
    """A change of one linear: alpha / r * up @ down, and of its bias."""

    up: Tensor  # (out, r)
    down: Tensor  # (r, in)
    alpha: float
    bias: Tensor | None = None  # (out,)
    magnitude: Tensor | None = None  # (out,), of PEFT's own DoRA
    full: bool = False


@torch.no_grad()
def read_style(
    state: Mapping[str, Any],
    components: Mapping[str, nn.Module | None],
    names: FamilyNames,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[dict[str, StylePart], dict[str, list[str]], int]:
    """A file's tensors as LoRA on the modules of a pipeline. Nothing is changed.

    Args:
        state: the file's tensors by key, floating point of any kind, fp8 too.
        components: the pipeline's models that may carry LoRA, by name; None for one that this base has not.
        metadata: of diffusers, `<component>.<key of the LoraConfig>`. A module's own `.alpha` goes first.

    Returns:
        component -> its part; reason -> what was left out; how many modules carry a full difference.

    Raises:
        InputError: a method, key or module that cannot be read exactly, wrong shapes, numbers that are not finite, or nothing
            for this pipeline.
    """
    modules, ignored = _group_by_module(state)
    places = Places(components, names)
    found: dict[str, Place] = {}
    lost: list[str] = []
    for name in modules:
        component, _ = places.component(name)
        if components.get(component) is None:
            ignored.setdefault(f"this base has no {component}", []).append(name)
        elif place := places.find(name):
            found[name] = place
        else:
            lost.append(places.explain_missing(name))
    if not found and (lost or not modules):
        raise InputError(
            "holds no LoRA for this pipeline"
            + (f": none of its modules is in this base, {listed(lost)}" if lost else ""),
            hint="give one of this family; names of diffusers, PEFT, ComfyUI, sd-scripts, OneTrainer, LyCORIS and XLabs are read",
        )
    if lost:
        raise InputError(
            f"{len(lost)} of {len(modules)} modules have no place in this base: {listed(lost)}",
            hint="give a file of this base's size and version, or leave these modules out of it",
        )
    if not found:
        raise InputError(
            "holds no LoRA for this pipeline: " + "; ".join(f"{why}: {listed(names)}" for why, names in ignored.items())
        )
    carriers: dict[tuple[str, str], str] = {}
    for name, place in found.items():
        for module in place.modules:
            if (other := carriers.setdefault((place.component, module), name)) != name:
                raise InputError(f"changes {module} twice: as {clip(other)} and as {clip(name)}")

    deltas: dict[str, dict[str, _Delta]] = {}
    without_alpha: list[str] = []
    for name, place in found.items():
        targets = [places.modules[place.component][module] for module in place.modules]
        try:
            alpha, root = (None, False) if "alpha" in modules[name] else _metadata_alpha(metadata or {}, place)
            delta = _delta(modules[name], targets, place, alpha, root=root)
        except InputError as error:
            raise error.at(clip(name)) from None
        if "down" in modules[name] and "alpha" not in modules[name] and alpha is None:
            without_alpha += [module for module in place.modules if "layout" in module]
        deltas.setdefault(place.component, {}).update(_split(delta, place, targets))
    if not any(delta.alpha or delta.bias is not None for there in deltas.values() for delta in there.values()):
        raise InputError("does nothing: every alpha in it is 0")
    parts = {component: _part(found_there, places.modules[component]) for component, found_there in deltas.items()}
    if without_alpha:
        warn_without_alpha("the tensors", len(without_alpha))
    return parts, ignored, sum(delta.full for there in deltas.values() for delta in there.values())


def warn_without_alpha(what: str, count: int) -> None:
    """A layout adapter is trained at alpha 2 r by default, and a dict of tensors does not say so."""
    logger.warning(
        "%s: no alpha is stated for %d linears of the layout stream: they act at alpha = rank, whatever they were trained with. "
        "Files that `train` and `export` write state it: give the file or its folder.",
        what,
        count,
    )


def _group_by_module(state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[str]]]:
    """Module name -> kind of tensor -> tensor; reason -> keys that are left out."""
    modules: dict[str, dict[str, Tensor]] = {}
    ignored: dict[str, list[str]] = {}
    unknown, refused, not_finite = [], Counter[str](), []
    for key, value in state.items():
        if key.startswith(EMBEDDINGS):
            ignored.setdefault("embeddings of textual inversion, which are no LoRA", []).append(key)
            continue
        name, ending = split_key(key)
        if ending in REFUSED:
            refused[f"{REFUSED[ending]}, e.g. {clip(key)}"] += 1
        elif not ending or not isinstance(value, Tensor):
            unknown.append(key)
        elif not value.dtype.is_floating_point and not (LEAVES[ending] == "alpha" and value.dtype in _INTEGERS):
            raise InputError(
                f"is stored as {value.dtype}", location=clip(key), hint="give the file in fp32, fp16, bf16 or fp8"
            )
        elif not (value := value.float() if value.element_size() == 1 else value).isfinite().all():  # fp8 can nothing
            not_finite.append(key)
        elif modules.setdefault(name, {}).setdefault(LEAVES[ending], value) is not value:
            raise InputError(f"gives {LEAVES[ending]} twice", location=clip(name))
    if refused:
        kinds = sorted({text.split(", e.g. ")[0] for text in refused})
        raise InputError(
            f"holds {' and '.join(kinds)}, which cannot be loaded as LoRA: {listed(text.split(', e.g. ')[1] for text in refused)}",
            hint="merge it into the base with the tool that made it, or give a LoRA, LoHa, LoKr, DoRA or full difference",
        )
    if unknown and (modules or any("lora" in key.lower() for key in unknown)):
        raise InputError(
            f"{len(unknown)} of {len(state)} keys are no part of a LoRA that is known here: {listed(unknown)}",
            hint="leave them out of the file",
        )
    if not_finite:
        raise InputError(f"{len(not_finite)} of {len(state)} tensors hold NaN or infinity: {listed(not_finite)}")
    return modules, ignored


def _metadata_alpha(metadata: Mapping[str, Any], place: Place) -> tuple[float | None, bool]:
    """What a file's metadata say of a module: its alpha (None where nothing is stated), and whether it is rank-stabilised."""
    prefix = f"{place.component}."
    config = {str(key).removeprefix(prefix): value for key, value in metadata.items() if str(key).startswith(prefix)}
    root, patterns = config.get("use_rslora") or False, config.get("alpha_pattern") or {}
    if not isinstance(root, bool):
        raise InputError(f"use_rslora is {clip(repr(root))}, not true or false")
    if not isinstance(patterns, dict):
        raise InputError(f"alpha_pattern is {clip(repr(patterns))}, not an object")
    alphas: set[float | None] = set()
    for module in place.modules:
        value = config.get("lora_alpha")
        for pattern, stated in patterns.items():
            # PEFT takes these for regular expressions; writers give plain names, with "^" for a whole one.
            if re.search(r"[^\w.^-]", pattern):
                raise InputError(f"alpha_pattern {clip(repr(pattern))} is not the name of a module")
            bare = pattern.removeprefix("^")
            if module == bare or (bare == pattern and module.endswith(f".{bare}")):
                value = stated
                break
        if value is not None and value not in FINITE:
            raise InputError(f"lora_alpha is {clip(repr(value))}, not a finite number")
        alphas.add(None if value is None else float(value))
    if len(alphas) > 1:
        raise InputError(f"the metadata state several alphas for one fused linear: {sorted(map(str, alphas))}")
    return alphas.pop(), root


def _delta(
    tensors: Mapping[str, Tensor], targets: Sequence[Any], place: Place, alpha: float | None, *, root: bool
) -> _Delta:
    """The change of the (fused) linear that `targets` make up, in the file's order of rows.

    Args:
        alpha, root: what the metadata state, where the tensors hold no alpha.
    """
    method = _method(tensors)
    width_in = math.prod(targets[0].weight.shape[1:]) if isinstance(targets[0], nn.Conv2d) else targets[0].in_features
    width_out = sum(_rows(target) for target in targets)
    try:
        up, down, rank = _factors(method, tensors, width_out, width_in)
    except (RuntimeError, IndexError):
        shapes = ", ".join(f"{kind} {tuple(t.shape)}" for kind, t in tensors.items() if kind not in _ADDED)
        raise InputError(f"the factors of this {method} do not belong together: {shapes}") from None
    location = " + ".join(place.modules)
    if (up.shape[0], down.shape[1]) != (width_out, width_in):
        raise InputError(
            f"the file changes a weight of {up.shape[0]} x {down.shape[1]}, and {location} is {width_out} x {width_in}",
            hint="give a file of this base's size and version",
        )
    if not down.shape[0]:
        raise InputError("has rank 0")
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise InputError(f"alpha has {tensors['alpha'].numel()} numbers")
        alpha = float(tensors["alpha"].item())
    scale = 1.0 if alpha is None or rank is None else alpha / (math.sqrt(rank) if root else rank)
    full = down.shape[0] >= min(width_out, width_in) and method != "LoRA"
    bias = _bias(tensors, scale, width_out)
    if bias is not None and any(target.bias is None for target in targets):
        raise InputError(f"changes the bias of {location}, which has none")
    magnitude = tensors.get("magnitude")
    if magnitude is not None and magnitude.numel() != width_out:
        raise InputError(f"has {magnitude.numel()} magnitudes, and {location} has {width_out} rows")
    if alpha is None or rank != down.shape[0] or root:  # else its own bits, as PEFT divides them
        alpha = scale * down.shape[0]
    delta = _Delta(up, down, alpha, bias, magnitude, full)
    if "dora_scale" in tensors:
        weight = torch.cat([_weight(target).flatten(1) for target in targets])
        if place.halves_swapped:
            weight = _swapped(weight)
        channels = targets[0].weight.shape[1] if isinstance(targets[0], nn.Conv2d) else width_in
        change = _dora(tensors["dora_scale"], weight, scale * (up.double() @ down.double()), channels)
        up, down = _full_rank(change)
        delta = _Delta(up, down, float(down.shape[0]), bias, full=True)
    largest = largest_update(delta.up, delta.down, abs(delta.alpha) / delta.down.shape[0])
    finite = delta.up.float().isfinite().all() and delta.down.float().isfinite().all()
    if not finite or not largest <= torch.finfo(torch.float32).max:
        factors = f"factors up to {delta.up.abs().max():.3g} and {delta.down.abs().max():.3g}"
        raise InputError(f"its change is not finite in fp32: {factors}, alpha {delta.alpha:.3g}")
    if largest > MAX_UPDATE:
        raise InputError(
            f"changes a weight by {largest:.3g}, more than {MAX_UPDATE:g}",
            hint="its alpha or its weights are wrong: get it anew",
        )
    return delta


def _method(tensors: Mapping[str, Tensor]) -> str:
    kinds = set(tensors) - _ADDED
    for method, (needed, possible) in _METHODS.items():
        own = needed | possible
        if kinds & own or (not kinds and "bias" in tensors and "bias" in needed):
            missing = needed - set(tensors)
            if kinds - own or missing:
                odd = (
                    f"has {', '.join(sorted(kinds - own))} too"
                    if kinds - own
                    else f"lacks {', '.join(sorted(missing))}"
                )
                raise InputError(f"is {method}, and {odd}")
            return method
    raise InputError(f"has {', '.join(sorted(tensors))} alone, which is no LoRA")


def _factors(method: str, t: Mapping[str, Tensor], width_out: int, width_in: int) -> tuple[Tensor, Tensor, int | None]:
    """(out, r), (r, in) and the rank that alpha is divided by, None where alpha has no meaning."""
    if any(value.ndim < 2 for kind, value in t.items() if kind not in _ADDED):
        raise IndexError("a factor is a vector")
    if method == "LoRA":
        up, down = t["up"], t["down"]
        rank = down.shape[0]
        if "mid" in t:
            return up.flatten(1).double(), _contract(t["mid"].double(), down.flatten(1).double()), rank
        if up.flatten(1).shape[1] != rank:
            raise RuntimeError
        return up.flatten(1), down.flatten(1), rank
    if method == "LoHa":
        pairs = [_pair(t[f"hada_w{i}_a"], t[f"hada_w{i}_b"], t.get(f"hada_t{i}")) for i in (1, 2)]
        (up_1, down_1), (up_2, down_2) = pairs
        if up_1.shape[0] != up_2.shape[0] or down_1.shape[1] != down_2.shape[1]:
            raise RuntimeError
        rank = t["hada_w1_b"].shape[0]
        if up_1.shape[1] * up_2.shape[1] >= min(width_out, width_in):
            return *_full_rank((up_1 @ down_1) * (up_2 @ down_2)), rank
        up = (up_1[:, :, None] * up_2[:, None, :]).flatten(1)
        down = (down_1[:, None, :] * down_2[None, :, :]).flatten(0, 1)
        return up, down, rank
    if method == "LoKr":
        decomposed: int | None = None
        kron = []
        for i in (1, 2):
            pair = {f"lokr_w{i}_a", f"lokr_w{i}_b"} & t.keys()
            if f"lokr_w{i}" in t and pair:
                raise InputError(f"gives lokr_w{i} whole and as factors ({listed(sorted(pair))})")
            if f"lokr_w{i}" in t:
                kron.append(_full_rank(t[f"lokr_w{i}"].double().flatten(1)))
            elif {f"lokr_w{i}_a", f"lokr_w{i}_b"} <= t.keys():
                kron.append(_pair(t[f"lokr_w{i}_a"], t[f"lokr_w{i}_b"], t.get(f"lokr_t{i}")))
                decomposed = t[f"lokr_w{i}_b"].shape[0]
            else:
                raise InputError(f"is LoKr, and lacks lokr_w{i}")
        (up_1, down_1), (up_2, down_2) = kron
        if up_1.shape[1] * up_2.shape[1] > min(width_out, width_in):
            return *_full_rank(torch.kron(up_1 @ down_1, up_2 @ down_2)), decomposed
        return torch.kron(up_1, up_2), torch.kron(down_1, down_2), decomposed
    if method == "a full difference":
        return *_full_rank(t["diff"].flatten(1)), None
    return torch.zeros(width_out, 1), torch.zeros(1, width_in), None  # a bias alone


def _pair(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factors (out, r), (r, in) of LoHa and LoKr; with a core they are those of a Tucker decomposition."""
    if core is not None:
        return a.double().T.contiguous(), _contract(core.double(), b.double())
    if a.shape[1] != b.shape[0]:
        raise RuntimeError
    return a.double(), b.double().flatten(1)


def _contract(core: Tensor, down: Tensor) -> Tensor:
    """(r, s, ...) with (s, in) in place of its second axis, flattened: (r, in * ...)."""
    if core.shape[1] != down.shape[0]:
        raise RuntimeError
    return torch.einsum("rs...,si->ri...", core, down).flatten(1)


def _full_rank(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix and the smaller of its identities: factors of rank min(rows, columns)."""
    rows, columns = matrix.shape
    if columns <= rows:
        return matrix, torch.eye(columns, dtype=matrix.dtype)
    return torch.eye(rows, dtype=matrix.dtype), matrix


def _bias(tensors: Mapping[str, Tensor], scale: float, width_out: int) -> Tensor | None:
    bias = tensors["bias"].double() if "bias" in tensors else None
    if "up_bias" in tensors:
        bias = scale * tensors["up_bias"].double() + (0 if bias is None else bias)
    if bias is not None and tuple(bias.shape) != (width_out,):
        raise InputError(f"changes a bias of shape {tuple(bias.shape)}, and there are {width_out} rows")
    return bias


def _dora(magnitudes: Tensor, weight: Tensor, change: Tensor, channels: int) -> Tensor:
    """magnitude * (W + change) / its norms - W, all (out, in), in fp64; which norms, the magnitudes' shape says."""
    rows = weight.shape[0]
    changed = (weight + change).view(rows, channels, -1)
    m = magnitudes.double()
    if m.shape[0] == rows and m.numel() == rows:
        norms, m = changed.flatten(1).norm(dim=1).view(rows, 1, 1), m.view(rows, 1, 1)
    elif m.shape[0] == 1 and m.numel() == channels:
        norms, m = changed.transpose(0, 1).flatten(1).norm(dim=1).view(1, channels, 1), m.view(1, channels, 1)
    else:
        raise InputError(f"dora_scale has shape {tuple(m.shape)}, and the weight is {rows} x {channels}")
    tiny = torch.finfo(torch.float64).tiny
    return (m * changed / norms.clamp_min(tiny)).flatten(1) - weight


def _weight(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
        raise InputError(
            "dora_scale needs the base's exact weights, and this base is quantised", hint="load it unquantised"
        )
    if weight.is_meta:
        raise InputError(
            "dora_scale needs the base's weights, which are offloaded", hint="load styles before offloading"
        )
    return weight.detach().to("cpu", torch.float64)


def _rows(module: Any) -> int:
    return module.out_channels if isinstance(module, nn.Conv2d) else module.out_features


def _swapped(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def _split(whole: _Delta, place: Place, targets: Sequence[Any]) -> dict[str, _Delta]:
    """The rows of each of our modules, in fp32, with memory of their own."""

    def cut(rows: Tensor | None) -> Sequence[Tensor | None]:
        if rows is None:
            return [None] * len(targets)
        pieces = (_swapped(rows) if place.halves_swapped else rows).split([_rows(target) for target in targets])
        return [piece.to(torch.float32, copy=True).contiguous() for piece in pieces]

    pieces = zip(place.modules, cut(whole.up), cut(whole.bias), cut(whole.magnitude), strict=True)
    return {
        module: _Delta(up, whole.down.to(torch.float32, copy=True), whole.alpha, bias, magnitude, whole.full)  # type: ignore[arg-type]
        for module, up, bias, magnitude in pieces
    }


def _part(deltas: Mapping[str, _Delta], modules: Mapping[str, Any]) -> StylePart:
    """One component's changes as PEFT takes them."""
    dora = {module for module, delta in deltas.items() if delta.magnitude is not None}
    native = len(dora) == len(deltas) and not any(delta.bias is not None for delta in deltas.values())
    if dora and not native:
        deltas = {name: _without_magnitude(delta, modules[name]) for name, delta in deltas.items()}
    biased = any(delta.bias is not None for delta in deltas.values())
    if biased:
        without = [name for name in deltas if modules[name].bias is None]
        if without:
            raise InputError(f"changes biases, and these of its modules have none: {listed(without)}")
    sizes = Counter((delta.down.shape[0], delta.alpha) for delta in deltas.values())
    (rank, alpha), _ = sizes.most_common(1)[0]
    groups = {size: [n for n, d in deltas.items() if (d.down.shape[0], d.alpha) == size] for size in sizes}
    # One pattern for all modules of a size: PEFT tries every pattern on every module.
    patterns = {
        "^(?:" + "|".join(map(re.escape, names)) + ")": size for size, names in groups.items() if size != (rank, alpha)
    }
    state: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        module = modules[name]
        down, up = delta.down, delta.up
        if isinstance(module, nn.Conv2d):
            down, up = down.view(-1, *module.weight.shape[1:]), up[:, :, None, None]
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = down.contiguous(), up.contiguous()
        if biased:
            # PEFT scales it by alpha / r, as the factors.
            scaling = delta.alpha / delta.down.shape[0]
            bias = torch.zeros(_rows(module)) if delta.bias is None else delta.bias
            if not scaling and bias.any():
                raise InputError("changes a bias, and its alpha is 0", location=clip(name))
            state[f"{name}.lora_B.bias"] = bias / scaling if scaling else bias
        if native and delta.magnitude is not None:
            state[f"{name}.lora_magnitude_vector"] = delta.magnitude
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pattern: size[0] for pattern, size in patterns.items()},
        "alpha_pattern": {pattern: size[1] for pattern, size in patterns.items()},
        "target_modules": sorted(deltas),
        "lora_dropout": 0.0,
        "use_dora": bool(dora) and native,
        "lora_bias": biased,
    }
    return StylePart(config, state)


def _without_magnitude(delta: _Delta, module: Any) -> _Delta:
    """PEFT's DoRA of one module among plain ones, as a full difference."""
    if delta.magnitude is None:
        return delta
    change = delta.alpha / delta.down.shape[0] * (delta.up.double() @ delta.down.double())
    whole = _dora(delta.magnitude.flatten()[:, None], _weight(module).flatten(1), change, module.weight.shape[1])
    up, down = _full_rank(whole)
    return _Delta(up.float(), down.float(), float(down.shape[0]), delta.bias, full=True)
