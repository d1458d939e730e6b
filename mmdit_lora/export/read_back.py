"""The reading side of `export`: a fresh process loads what was written, as a user does, and writes its outputs to a file.

    python -m mmdit_lora.export.read_back FORMAT WRITTEN ANSWER BASE [STREAM]

Nothing of the writing side is used here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdit_lora.errors import InputError
from mmdit_lora.layout import Box, Layout
from mmdit_lora.lora import DIFFUSERS_FILE, load_adapter
from mmdit_lora.models import LayoutInputs
from mmdit_lora.models.creatilayout import recipes, variant_of_model
from mmdit_lora.models.families import stored_transformer
from mmdit_lora.pipelines import LayoutPipeline, load_pipeline

STEPS = 4
BARE = "velocity of the transformer alone"
STREAM_FILE = "model.safetensors"


def probe(model: Any, *, seed: int = 0) -> dict[str, Any]:
    """Random inputs of `forward` that reach every layer of `model`: two samples, three boxes each, the last one masked once."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    corners = torch.rand(2, 3, 2, 2, generator=generator).sort(dim=2).values
    mask = torch.tensor([[True, True, True], [True, True, False]])
    side = min(8 * model.latent_multiple, model.max_latent_side or sys.maxsize)
    texts = {name: normal(2, *shape) for name, shape in model.text_shapes(8).items()}
    phrase = (model.phrase_dim,) if model.phrase_tokens is None else (model.phrase_tokens, model.phrase_dim)
    inputs: dict[str, Any] = model.model_inputs(
        normal(2, model.latent_channels, side, side),
        torch.tensor([0.3, 0.8]),
        texts | ({"mask": torch.ones(2, 8, dtype=torch.bool)} if "mask" in texts else {}),
    )
    return inputs | {"layout": LayoutInputs(corners.flatten(2), normal(2, 3, *phrase), mask)}


@torch.no_grad()
def outputs(model: Any, *, layout_scale: float = 1.0) -> Tensor:
    """What `model` predicts for `probe`."""
    answer = model(**probe(model), layout_scale=layout_scale, return_dict=False)[0]
    return answer if isinstance(answer, Tensor) else torch.stack(list(answer))


def open_transformer(base: str) -> Any:
    """The transformer of a base alone, in fp32."""
    return stored_transformer(base)[0].from_pretrained(base, subfolder="transformer", dtype=torch.float32)


@torch.no_grad()
def take_creatilayout_stream(file: Path, model: nn.Module) -> None:
    """Put a stream under CreatiLayout's names into `model`, by the same recipes as `import creatilayout`."""
    theirs = load_file(file)
    own = {name: p for name, p in model.named_parameters() if "layout" in name}
    made = recipes(own, variant_of_model(model))
    if {source for recipe in made.values() for source in recipe.sources} != theirs.keys():
        raise InputError("is not the whole stream of this base", location=str(file))
    for name, recipe in made.items():
        own[name].copy_(recipe(theirs))


def read(to: str, written: str, base: str, stream: str | None = None) -> LayoutPipeline:
    """The pipeline with what was written, by the calls that its users make; no mode is set for them."""
    if to == "merged":
        return load_pipeline(written) if stream is None else load_pipeline(base, stream=written)
    pipe: Any = load_pipeline(base, stream=stream)
    if to == "peft":
        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, written)
    elif to == "ours":
        load_adapter(pipe.transformer, written)
    elif to == "creatilayout stream":
        take_creatilayout_stream(Path(written) / STREAM_FILE, pipe.transformer)
    else:
        pipe.load_lora_weights(written)
    return pipe


def answers(pipe: Any, *, twice: bool = True) -> dict[str, Tensor]:
    """The velocity for `probe`, and a sampled image (1, height, width, 3) in [0, 1], of few pixels and steps.

    Args:
        twice: once more, with the same seed, as "velocity again" and "image again".
    """
    boxes = Box((0.1, 0.1, 0.9, 0.4), "a red square"), Box((0.1, 0.5, 0.4, 0.9), "a blue circle")
    layout = Layout("a red square and a blue circle", boxes)
    side = min(pipe.default_side, 8 * pipe.transformer.latent_multiple * pipe.vae_scale_factor)
    found = {}
    for again in ("", " again") if twice else ("",):
        found[f"velocity{again}"] = outputs(pipe.transformer).contiguous()
        generator = torch.Generator().manual_seed(0)
        image = pipe(
            layout, num_inference_steps=STEPS, height=side, width=side, generator=generator, output_type="np"
        ).images
        found[f"image{again}"] = torch.from_numpy(image).contiguous()
    return found


def main(to: str, written: str, answer: str, base: str, stream: str | None = None) -> None:
    pipe = read(to, written, base, stream)
    found = answers(pipe)
    if to == "diffusers":  # the same file by diffusers' own loader of transformers
        bare = load_pipeline(base, stream=stream)
        bare.transformer.load_lora_adapter(written, weight_name=DIFFUSERS_FILE)
        found[BARE] = outputs(bare.transformer).contiguous()
    save_file(found, Path(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
