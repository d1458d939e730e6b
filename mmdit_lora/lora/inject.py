"""Adding LoRA to a layout stream, and taking it off again: PEFT does the LoRA; here are the checks that PEFT leaves out.

LoRA is arXiv 2106.09685; the default is its application to `layout_mlp.fc1` and `fc2` of every block and of the layout
processor. The checks are for what PEFT 0.21.2 does silently.
"""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import peft
import torch
from diffusers.training_utils import cast_training_params
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from mmdit_lora.config.ranges import MAX_UPDATE
from mmdit_lora.errors import InputError, clip, listed, shown
from mmdit_lora.models.adapter_layers import (
    adapter_layers,
    check_adapter_name,
    chosen_adapters,
    match_training_mode,
    own_modules,
    reenable_adapters,
    refuse_fused,
    refuse_wrapped,
)


class AdapterRollback:
    """What a load may change of models, to bring it back after one that failed half-way: no layer or name of it is left."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = list(models)
        self.active = {layer: list(layer.active_adapters) for model in models for _, layer in adapter_layers(model)}
        self.disabled = {layer: layer.disable_adapters for layer in self.active}
        self.trained = {p: p.requires_grad for model in models for p in model.parameters()}

    def __call__(self, adapter_name: str) -> None:
        """Take `adapter_name` off again."""
        for model in self.models:
            for name, layer in adapter_layers(model):
                layer.delete_adapter(adapter_name)
                if layer in self.active:
                    layer.set_adapter(self.active[layer])
                    layer.enable_adapters(not self.disabled[layer])
                else:
                    model.set_submodule(name, layer.get_base_layer())
            configs: Any = getattr(model, "peft_config", None)
            if configs is not None:
                configs.pop(adapter_name, None)
                if not configs:
                    del model.peft_config
                    model._hf_peft_config_loaded = False  # type: ignore[assignment]
        for parameter, trained in self.trained.items():
            parameter.requires_grad_(trained)


TARGETS = ("layout_mlp.fc1", "layout_mlp.fc2")


def default_lora_config() -> peft.LoraConfig:
    """r = 16, alpha = 32, dropout 0.1, no bias, on every `layout_mlp.fc1` and `layout_mlp.fc2`."""
    return peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, bias="none", target_modules=list(TARGETS))


def describe_lora(config: peft.LoraConfig, *, lora_plus: float = 1.0) -> str:
    """What an adapter is, in one line for cards and headers: rank, alpha, and every setting that is not the default.

    For example "LoRA (r=16, alpha=32, dropout=0.1)", or "DoRA (r=8, alpha=16, rank-stabilised, r=4 on fc1, on fc1, fc2)".

    Args:
        lora_plus: learning rate of the B factors over that of the A factors in training (LoRA+).
    """
    parts = [f"r={config.r}", f"alpha={config.lora_alpha:g}"]
    parts += [f"dropout={config.lora_dropout:g}"] if config.lora_dropout else []
    parts += ["rank-stabilised"] if config.use_rslora else []
    parts += [f"LoRA+ {lora_plus:g}"] if lora_plus != 1.0 else []
    for sign, patterns in (("r", config.rank_pattern), ("alpha", config.alpha_pattern)):
        by_value: dict[float, list[str]] = {}
        for pattern, value in (patterns or {}).items():
            by_value.setdefault(value, []).append(pattern)
        parts += [f"{sign}={value:g} on {listed(names)}" for value, names in by_value.items()]
    targets = config.target_modules
    if isinstance(targets, str):
        parts.append(f"on modules that match {clip(targets)}")
    elif targets is not None and set(targets) != set(TARGETS):
        parts.append(f"on {listed(sorted(targets))}")
    if config.layers_to_transform is not None:
        parts.append(f"layers {shown(config.layers_to_transform)} only")
    if excluded := config.exclude_modules:
        parts.append(f"not on {clip(excluded) if isinstance(excluded, str) else listed(sorted(excluded))}")
    parts += ["with biases of its own"] if config.lora_bias else []
    return f"{'DoRA' if config.use_dora else 'LoRA'} ({', '.join(parts)})"


@dataclass(frozen=True)
class LayoutLoraReport:
    """What `add_layout_lora` did.

    Args:
        targets: module names that carry LoRA, in the model's order.
        trainable_params: numbers in the LoRA; every other parameter is frozen.
        total_params: numbers in the base with its layout stream, without the LoRA.
        adapter_bytes: size of the adapter's weights in fp32.
        zero_gates: `layout_stream.out_proj` modules whose weight and bias are exactly 0 (unknown, so empty, on meta).
        dead_targets: targets that no gradient can ever reach: every gate behind them is zero, or nothing reads their output.
    """

    targets: list[str]
    trainable_params: int
    total_params: int
    adapter_bytes: int
    zero_gates: list[str] = field(default_factory=list)
    dead_targets: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return f" ({', '.join(names[:2])}{', ...' * (len(names) > 2)})" if names else ""

        share = 100 * self.trainable_params / max(self.total_params, 1)
        rows = [
            ("targets", f"{len(self.targets)} linears" + some(self.targets)),
            ("trainable", f"{self.trainable_params:,} of {self.total_params:,} parameters ({share:.3f} %)"),
            ("adapter", f"{self.adapter_bytes / 2**20:.2f} MiB in fp32"),
            ("zero gates", f"{len(self.zero_gates)}" + some(self.zero_gates)),
            ("dead targets", f"{len(self.dead_targets)}" + some(self.dead_targets)),
        ]
        return "\n".join(f"{name:<13} {value}" for name, value in rows)


def add_layout_lora(
    model: nn.Module, config: peft.LoraConfig | None = None, *, adapter_name: str = "default"
) -> LayoutLoraReport:
    """Freeze the model, add LoRA in fp32, and prove that exactly the LoRA trains. Also on the meta device.

        report = add_layout_lora(pipe.transformer, LoraConfig(r=8, lora_alpha=16, target_modules=["layout_mlp.fc1"]))
        optimizer = torch.optim.AdamW(lora_parameters(pipe.transformer), lr=1e-4)

    Args:
        model: a diffusers transformer (`PeftAdapterMixin`); changed in place.
        config: default `default_lora_config()`; not changed.

    Returns:
        The report. Zero gates are listed, not refused: see `refuse_zero_gates`.

    Raises:
        InputError: the adapter exists already, or its name cannot be one; a target or pattern matches no module; the config
            would train or change anything but LoRA weights; an adapter is fused into the weights. The model is then as it was.
    """
    check_can_add(model, adapter_name)
    config = copy.deepcopy(config) if config is not None else default_lora_config()
    targets = find_targets(model, config)
    zero_gates = _zero_gates(model)
    undo = AdapterRollback([model])
    # Freeze first, inject second. The other way round freezes the LoRA too, and nothing trains.
    model.requires_grad_(False)
    inject(model, config, adapter_name)
    # On a bf16 base PEFT makes bf16 LoRA, where AdamW at 1e-4 moves only a third of the entries.
    cast_training_params(model, torch.float32)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {with_adapter(name, adapter_name): shape for name, shape in adapter_shapes(targets, config).items()}
    if not trained or {name: tuple(p.shape) for name, p in trained.items()} != expected:
        wrong = sorted(trained.keys() ^ expected.keys()) or sorted(trained)
        undo(adapter_name)
        raise InputError(
            f"the trainable parameters are not exactly the LoRA: {', '.join(wrong[:8])}",
            hint="this LoraConfig trains something that an adapter cannot hold; use r, lora_alpha, target_modules",
        )
    params = sum(p.numel() for p in trained.values())
    return LayoutLoraReport(
        targets=list(targets),
        trainable_params=params,
        total_params=sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name),
        adapter_bytes=4 * params,
        zero_gates=zero_gates,
        dead_targets=_dead_targets(model, targets, zero_gates),
    )


def find_targets(model: nn.Module, config: peft.LoraConfig) -> dict[str, nn.Module]:
    """The linears that `config` would adapt, by module name, in the model's order.

    Raises:
        InputError: a target or pattern matches nothing, a target is no linear layer, or the config is not pure LoRA.
    """
    _refuse_impure(config)
    if not config.target_modules or (isinstance(config.target_modules, str) and config.target_modules == "all-linear"):
        raise InputError(f"target_modules is {shown(config.target_modules)}", hint=f"name them, e.g. {list(TARGETS)}")
    modules = dict(own_modules(model))

    def matched(by: peft.LoraConfig) -> dict[str, nn.Module]:
        # The excluded answer of PEFT is a false value, a match may be an `re.Match`.
        try:
            return {name: m for name, m in modules.items() if check_target_module_exists(by, name)}
        except re.error as error:
            raise InputError(
                f"target_modules {clip(repr(by.target_modules), 100)} is no regular expression: {error}",
                hint=f"name them, e.g. {list(TARGETS)}",
            ) from None

    patterns = [config.target_modules] if isinstance(config.target_modules, str) else sorted(config.target_modules)
    for pattern in patterns:
        one = copy.copy(config)
        one.target_modules = pattern if isinstance(config.target_modules, str) else [pattern]
        if not matched(one):
            raise _no_match("target module", pattern, modules)
    found = matched(config)
    for name, module in found.items():
        if not isinstance(module, nn.Linear):
            raise InputError(
                f"target {name!r} is a {type(module).__name__}", hint="target linear layers, e.g. its .fc1"
            )
    for kind in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, kind) or {}:
            try:
                hits = any(get_pattern_key([pattern], name) != name or pattern == name for name in found)
            except re.error as error:
                raise InputError(
                    f"{kind} {clip(repr(pattern), 100)} is no regular expression: {error}", hint="state module names"
                ) from None
            if not hits:
                raise _no_match(kind, pattern, found)
    return found


def refuse_zero_gates(report: LayoutLoraReport) -> None:
    """Stop where frozen zero gates keep targets from ever getting a gradient.

    Raises:
        InputError: with what to do about it.
    """
    if not (report.zero_gates and report.dead_targets):
        return
    if len(report.dead_targets) == len(report.targets):
        raise InputError(
            f"the layout stream of this base is untrained: {len(report.zero_gates)} of its gates (layout_stream.out_proj) "
            "are zero, and frozen zero gates give every LoRA weight a gradient of exactly 0, forever",
            hint="pretrain the layout stream first (`method: layout_stream`), or import a pretrained one "
            "(`mmdit-lora import creatilayout`)",
        )
    raise InputError(
        f"{len(report.dead_targets)} targets would never get a gradient, because every gate behind them is zero: "
        f"{', '.join(report.dead_targets[:4])}",
        hint="pretrain the whole layout stream (`method: layout_stream`), or leave these targets out",
    )


def lora_parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """LoRA parameters of one adapter (None: of all), sorted by name: the same order in every process and run."""
    named = dict(model.named_parameters())
    return [
        named[name]
        for name in sorted(named)
        if "lora_" in name
        and (adapter_name is None or f".{adapter_name}." in name or name.endswith(f".{adapter_name}"))
    ]


def remove_adapter(model: nn.Module, adapter_name: str = "default") -> None:
    """Take an adapter off. Others stay as they are: active or not, with their weights; linears that carry none are plain again.

    Raises:
        InputError: the model has no adapter of that name, or it is fused into the weights, where it would stay. (After
            `fuse_lora`, `unload_lora_weights` leaves it there on purpose: that is how diffusers bakes one in. Whoever removes
            one by name wants the image without it.)
    """
    refuse_wrapped(model)
    chosen_adapters([adapter_name], getattr(model, "peft_config", {}))
    refuse_fused(model, names=[adapter_name])
    if set(model.peft_config) == {adapter_name}:  # type: ignore[arg-type]
        model.unload_lora()  # type: ignore[operator]
        return
    with keep_active(model), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Adapter .* was active which is now deleted"
        )  # PEFT would take another
        model.delete_adapters(adapter_name)  # type: ignore[operator]
    for name, layer in adapter_layers(model):
        if not _adapters_of(layer):
            model.set_submodule(name, layer.get_base_layer())


def check_can_add(model: nn.Module, adapter_name: Any) -> None:
    """Whether a model can take one more adapter of this name.

    Raises:
        InputError: it is wrapped in a `PeftModel`; the name cannot be one or is taken; or an adapter is fused into the weights.
    """
    refuse_wrapped(model)
    check_adapter_name(adapter_name)
    if adapter_name in getattr(model, "peft_config", {}):
        raise InputError(f"the model has an adapter {adapter_name!r} already", hint="give the new one another name")
    refuse_fused(model)


@contextmanager
def keep_active(model: nn.Module, keep: Callable[[str], bool] = lambda _: True) -> Iterator[None]:
    """Adapters that are active stay active beside those that join in this context, at their weights, frozen or not as before.

    PEFT switches off all others when an adapter is added, and may switch one on when another is deleted, and warns of both.
    After `disable_lora`, adapters that join act alone: what did not act before stays off, and is no longer active.

    Args:
        keep: which of the active adapters, by name.
    """
    active = {layer: list(layer.active_adapters) for _, layer in adapter_layers(model)}
    disabled = {layer for layer in active if layer.disable_adapters}
    trained = {p: p.requires_grad for p in model.parameters()}
    before = set(getattr(model, "peft_config", {}))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
            yield
    finally:
        now = getattr(model, "peft_config", {})
        joined = [name for name in now if name not in before]
        if joined:
            active |= {layer: [] for layer in disabled}
            reenable_adapters(model)
        everywhere = next(iter(active.values()), [])  # layers that an adapter brings have the same ones active
        for _, layer in adapter_layers(model):
            kept = [name for name in active.get(layer, everywhere) if name in now and keep(name)]
            layer.set_adapter(kept + joined)
        for parameter in model.parameters():
            if parameter in trained:
                parameter.requires_grad_(trained[parameter])


def is_layout_adapter(model: nn.Module, adapter_name: str) -> bool:
    """Whether an adapter of the model adapts any part of the layout stream."""
    return any("layout" in name and adapter_name in _adapters_of(layer) for name, layer in adapter_layers(model))


def inject(model: nn.Module, config: peft.LoraConfig, adapter_name: str) -> None:
    """diffusers' `add_adapter`, quietly, beside the active adapters, and in the model's mode: PEFT's layers start in
    training mode, and would drop out."""
    with keep_active(model):
        model.add_adapter(config, adapter_name)  # type: ignore[operator]
    match_training_mode(model)


def merge_adapter(model: Any, *, in_place: bool = False) -> Any:
    """The plain model with its active adapters added into the weights: W + alpha / r * B A. No LoRA module is left.

    Merged in the dtype of the base: in bf16 the sum is rounded, so merge an fp32 copy where that matters.

    Raises:
        InputError: the model has no adapter, or the merged weights would not be finite.
    """
    if not adapter_layers(model):
        raise InputError("the model has no adapter to merge")
    merged = merged_copy(model, in_place=in_place)
    merged.unload_lora()
    return merged


def merged_copy(model: Any, *, in_place: bool = False) -> Any:
    """A copy of `model`, of any class, whose adapters' active updates are in the weights of its linears, under the adapters'
    layers; see `without_adapters`.

    Raises:
        InputError: the merged weights would not be finite.
    """
    merged = model if in_place else copy.deepcopy(model)
    try:
        for _, layer in adapter_layers(merged):
            layer.merge(safe_merge=True)
    except ValueError as error:
        raise InputError(f"the merged weights are not finite ({error})") from None
    return merged


def adapter_shapes(targets: Mapping[str, nn.Module], config: peft.LoraConfig) -> dict[str, tuple[int, ...]]:
    """Names (without prefix and adapter name) and shapes of the tensors that PEFT gives these targets."""
    shapes: dict[str, tuple[int, ...]] = {}
    ranks = config.rank_pattern or {}
    for name, module in targets.items():
        rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
        width_in, width_out = cast(int, module.in_features), cast(int, module.out_features)
        shapes[f"{name}.lora_A.weight"] = (rank, width_in)
        shapes[f"{name}.lora_B.weight"] = (width_out, rank)
        if config.lora_bias:
            shapes[f"{name}.lora_B.bias"] = (width_out,)
        if config.use_dora:
            shapes[f"{name}.lora_magnitude_vector"] = (width_out,)
    return shapes


def largest_update(up: Tensor, down: Tensor, scale: float) -> float:
    """Largest entry of scale * B A, or, where that is at most `MAX_UPDATE`, a bound of it; up (out, r), down (r, in)."""
    up, down = up.double(), down.double()
    bound = scale * up.norm(dim=1).max().item() * down.norm(dim=0).max().item()
    return bound if bound <= MAX_UPDATE else scale * (up @ down).abs().max().item()


def with_adapter(name: str, adapter_name: str) -> str:
    """PEFT's parameter name: `x.lora_A.weight` -> `x.lora_A.<adapter>.weight`."""
    if name.endswith(".lora_magnitude_vector"):
        return f"{name}.{adapter_name}.weight"
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{adapter_name}.{leaf}"


def _refuse_impure(config: peft.LoraConfig) -> None:
    """Refuse what would train or change anything but LoRA weights: an adapter file could not hold it."""
    if getattr(config, "bias", "none") != "none":
        raise InputError(
            f"bias is {shown(config.bias)}", hint='set bias="none": biases of the base are not part of an adapter'
        )
    for key in ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"):
        if getattr(config, key, None):
            raise InputError(f"{key} is set", hint=f"leave {key} out: only LoRA on linear layers is part of an adapter")
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise InputError(
            f"init_lora_weights is {shown(init)}, which changes the base", hint='use true, "gaussian" or "orthogonal"'
        )


def _adapters_of(layer: Any) -> list[str]:
    return list(getattr(layer, "r", ()))


def _zero_gates(model: nn.Module) -> list[str]:
    gates = {name: m for name, m in model.named_modules() if name.endswith("layout_stream.out_proj")}
    return [name for name, gate in gates.items() if not any(p.is_meta or p.any() for p in gate.parameters())]


def _dead_targets(model: nn.Module, targets: Iterable[str], zero_gates: list[str]) -> list[str]:
    """Targets that reach no loss: the query of a stream whose output is dropped, or all gates behind them are zero."""
    targets = list(targets)
    gates = [name for name, _ in model.named_modules() if name.endswith("layout_stream.out_proj")]
    streams = [name.removesuffix(".out_proj") for name in gates]
    feeds_own_gate = [model.get_submodule(name).mlp_feeds_own_gate for name in streams]
    # A gate that is itself a target opens in the first step.
    open_at = [i for i, gate in enumerate(gates) if gate not in zero_gates or gate in targets]
    last_open = open_at[-1] if open_at else -1

    def dead(name: str) -> bool:
        if name.endswith(".add_q_proj") and getattr(
            model.get_submodule(name.rpartition(".")[0]), "context_pre_only", False
        ):
            return True
        if name.startswith("layout_processor."):
            return bool(gates) and last_open < 0
        for index, stream in enumerate(streams):
            if name.startswith(f"{stream}."):
                # All of a stream is read by its own gate, but an MLP that works on layout tokens only: by the next one.
                next_gate = name.startswith(f"{stream}.layout_mlp.") and not feeds_own_gate[index]
                return last_open < index + next_gate
        return False

    return [name for name in targets if dead(name)]


def _no_match(kind: str, pattern: str, names: Iterable[str]) -> InputError:
    """PEFT is silent about one wrong name among several."""
    # Compare with name endings of as many parts as the pattern has, so that "layout_mlp.fc3" is near "layout_mlp.fc1".
    pattern = clip(pattern, 200)
    parts = pattern.count(".") + 1
    endings = list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names))
    near = difflib.get_close_matches(pattern, endings, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see the model's module names"
    return InputError(f"{kind} {pattern!r} matches no module", hint=hint)
