"""The reading side of `export`: a fresh process opens what was written, with diffusers and PEFT, and answers its outputs.

    python -m mmdit_lora.export_read FORMAT WRITTEN BASE ANSWER

Nothing of the writing side is used here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdit_lora.errors import InputError
from mmdit_lora.models import LayoutInputs
from mmdit_lora.models.creatilayout import recipes, to_creatilayout, variant_of_model
from mmdit_lora.models.families import stored_transformer
from mmdit_lora.pipelines import load_pipeline

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # CreatiLayout's classes read the same
STREAM_FILE = "model.safetensors"


def probe(model: Any, *, seed: int = 0) -> dict[str, Any]:
    """Random inputs of `forward` that reach every layer of `model`: two samples, three boxes each, the last one masked once."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    corners = torch.rand(2, 3, 2, 2, generator=generator).sort(dim=2).values
    mask = torch.tensor([[True, True, True], [True, True, False]])
    side = min(8 * model.latent_multiple, model.max_latent_side or sys.maxsize)
    phrase = (model.phrase_dim,) if model.phrase_tokens is None else (model.phrase_tokens, model.phrase_dim)
    inputs: dict[str, Any] = model.model_inputs(
        normal(2, model.latent_channels, side, side),
        torch.tensor([0.3, 0.8]),
        normal(2, 8, config.joint_attention_dim),
        normal(2, config.pooled_projection_dim),
    )
    return inputs | {"layout": LayoutInputs(corners.flatten(2), normal(2, 3, *phrase), mask)}


@torch.no_grad()
def outputs(model: Any, *, layout_scale: float = 1.0) -> Tensor:
    """What `model` predicts for `probe`."""
    return model(**probe(model), layout_scale=layout_scale).sample


def open_transformer(base: str) -> Any:
    """The transformer of a base alone, in fp32."""
    return stored_transformer(base)[0].from_pretrained(base, subfolder="transformer", dtype=torch.float32)


def from_flat_names(state: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], peft.LoraConfig]:
    """Tensors named `lora_<module, dots as underscores>.{lora_down.weight, lora_up.weight, alpha}` as PEFT has them.

    Raises:
        InputError: a name stands for no module of `model`.
    """
    modules = {"lora_" + name.replace(".", "_"): name for name, _ in model.named_modules() if name}
    named: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for key, value in state.items():
        flat, _, leaf = key.partition(".")
        if flat not in modules:
            raise InputError(f"{flat!r} stands for no module of this base")
        name = modules[flat]
        if leaf == "alpha":
            alphas[name] = value.item()
        else:
            named[f"{name}.{ {'lora_down.weight': 'lora_A.weight', 'lora_up.weight': 'lora_B.weight'}[leaf] }"] = value
            if leaf == "lora_down.weight":
                ranks[name] = value.shape[0]
    config = peft.LoraConfig(
        r=next(iter(ranks.values())),
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern={name: alphas.get(name, rank) for name, rank in ranks.items()},
    )
    return named, config


def from_creatilayout_names(file: Path, model: nn.Module) -> tuple[dict[str, Tensor], peft.LoraConfig]:
    """An adapter under CreatiLayout's names as PEFT has it on our modules."""
    variant = variant_of_model(model)
    ours: dict[str, str] = {}
    for name, module in model.named_modules():
        # Of the two that share a fused projection, the MLP's part is the one that can carry LoRA.
        if isinstance(module, nn.Linear) and "layout" in name and not (name.startswith("single") and ".to_out" in name):
            ours[to_creatilayout(name, variant)] = name
    with safe_open(file, framework="pt") as tensors:
        header = json.loads(tensors.metadata()["lora_adapter_metadata"])
    told = {key.removeprefix("transformer."): value for key, value in header.items()}
    state: dict[str, Tensor] = {}
    for key, value in load_file(file).items():
        module_name, _, leaf = key.removeprefix("transformer.").partition(".lora_")
        name = ours[module_name]
        width = model.get_submodule(name).in_features
        # What a fused projection reads before the MLP's columns is the attention's, which the LoRA leaves alone.
        state[f"{name}.lora_{leaf}"] = value[:, -int(width) :] if leaf == "A.weight" else value  # type: ignore[arg-type]
    config = peft.LoraConfig(
        r=told["r"],
        target_modules=[ours[name] for name in told["target_modules"]],
        rank_pattern={ours[name]: rank for name, rank in told["rank_pattern"].items()},
        alpha_pattern={ours[name]: alpha for name, alpha in told["alpha_pattern"].items()},
        use_rslora=told["use_rslora"],
        use_dora=told["use_dora"],
    )
    return state, config


@torch.no_grad()
def take_creatilayout_stream(file: Path, model: nn.Module) -> None:
    """Put a stream under CreatiLayout's names into `model`, by the same recipes as `import creatilayout`."""
    theirs = load_file(file)
    own = {name: p for name, p in model.named_parameters() if "layout" in name}
    made = recipes(own, variant_of_model(model))
    if {source for recipe in made.values() for source in recipe.sources} != theirs.keys():
        raise InputError("is not the whole stream of this base", where=str(file))
    for name, recipe in made.items():
        sources = [theirs[source] for source in recipe.sources]
        own[name].copy_(recipe.make(*sources) if recipe.make else sources[0])


def read(to: str, written: str, base: str) -> Any:
    """The transformer with what was written, in evaluation mode."""
    model: Any
    if to == "merged":
        model = open_transformer(written)
    elif to == "diffusers":
        pipe: Any = load_pipeline(base)
        pipe.load_lora_weights(written, weight_name=DIFFUSERS_FILE)
        model = pipe.transformer
    else:
        model = open_transformer(base)
        if to == "peft":
            from peft import PeftModel

            wrapped: Any = PeftModel.from_pretrained(model, written)
            return wrapped.eval().base_model.model
        if to == "creatilayout stream":
            take_creatilayout_stream(Path(written) / STREAM_FILE, model)
            return model.eval()
        if to == "creatilayout":
            state, config = from_creatilayout_names(Path(written) / DIFFUSERS_FILE, model)
        else:
            state, config = from_flat_names(load_file(written), model)
        model.add_adapter(config)
        outcome: Any = peft.set_peft_model_state_dict(model, state)
        assert not outcome.unexpected_keys
    return model.eval()


def main(to: str, written: str, base: str, answer: str) -> None:
    save_file({"sample": outputs(read(to, written, base)).contiguous()}, Path(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
