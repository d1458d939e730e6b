"""Small configs of the real classes, for tests."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from mmdit_lora.lora import lora_parameters
from mmdit_lora.models import FAMILIES, LayoutInputs, LayoutSD3Transformer2DModel
from mmdit_lora.pipelines import LayoutStableDiffusion3Pipeline

# Two heads of 16 on 8 x 8 = 64 image tokens.
SD3_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 48,
    "pos_embed_max_size": 16,
}
SD3_MEDIUM: dict[str, Any] = dict(FAMILIES["sd3"].presets["sd3-medium"])

# SD3-medium has neither; SD3.5-large has qk_norm; SD3.5-medium has both (of 24 blocks, the first 13 are dual).
VARIANTS: dict[str, dict[str, Any]] = {
    "sd3-medium": {},
    "sd3.5-large": {"qk_norm": "rms_norm"},
    "sd3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}


def tiny_transformer(*, open_gates: bool = True, seed: int = 0, **changes: Any) -> LayoutSD3Transformer2DModel:
    """A small `LayoutSD3Transformer2DModel` in eval mode; with open gates it stands for a trained layout stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LayoutSD3Transformer2DModel(**{**SD3_CONFIG, **changes})
        if open_gates:
            for block in model.transformer_blocks:
                torch.nn.init.normal_(block.layout_stream.out_proj.weight, std=0.5)
                torch.nn.init.normal_(block.layout_stream.out_proj.bias, std=0.1)
            torch.nn.init.normal_(model.layout_processor.null_phrase)
            torch.nn.init.normal_(model.layout_processor.null_box)
    return model.eval()


def plain_twin(model: Any) -> Any:
    """diffusers' own class with the weights of `model`, whose subclass that is."""
    stock: Any = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("diffusers."))
    known = inspect.signature(stock).parameters
    twin = stock(**{key: value for key, value in model.config.items() if key in known})
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "layout" not in k})
    return twin.eval()


def tiny_layout(
    counts: tuple[int, ...] = (3, 2),
    *,
    slots: int | None = None,
    seed: int = 1,
    width: int = 48,
    tokens: int | None = None,
) -> LayoutInputs:
    """Layouts with `counts` boxes, padded to `slots`. A layout's numbers do not depend on the padding or on the others."""
    slots = slots or max(*counts, 1)
    phrase = (width,) if tokens is None else (tokens, width)
    boxes = torch.full((len(counts), slots, 4), 0.5)
    phrases = torch.full((len(counts), slots, *phrase), 7.0)  # visible rubbish in the padding
    mask = torch.zeros(len(counts), slots, dtype=torch.bool)
    for row, count in enumerate(counts):
        generator = torch.Generator().manual_seed(seed * 1000 + row)
        for column in range(count):
            corner = torch.rand(2, generator=generator) * 0.5
            boxes[row, column] = torch.cat([corner, corner + 0.1 + torch.rand(2, generator=generator) * 0.4])
            phrases[row, column] = torch.randn(phrase, generator=generator)
            mask[row, column] = True
    return LayoutInputs(boxes, phrases, mask)


def tiny_inputs(batch: int = 2, *, seed: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Everything that the base's forward takes, for latents of 16 x 16 and 7 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 16, 16, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 7, 32, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch, 48, generator=generator).to(dtype),
        "timestep": torch.linspace(900, 300, batch),
    }


def tiny_pipeline(
    folder: Path, transformer: LayoutSD3Transformer2DModel | None = None
) -> LayoutStableDiffusion3Pipeline:
    """A whole pipeline, without T5, that paints 32 x 32 pixels. `folder` takes the tokenizer's files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        vae = tiny_vae()
        encoders = [tiny_text_encoder(projection_dim=width) for width in (16, 32)]
    tokenizer = tiny_tokenizer(folder)
    return LayoutStableDiffusion3Pipeline(
        transformer=tiny_transformer() if transformer is None else transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        max_sequence_length=8,
    )


def tiny_vae() -> AutoencoderKL:
    """Four latent channels, a cell covers 2 x 2 pixels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def tiny_text_encoder(*, projection_dim: int) -> CLIPTextModelWithProjection:
    """16 wide, 16 tokens."""
    config = CLIPTextConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=projection_dim,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config).eval()


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def velocity(model: torch.nn.Module, **kwargs: Any) -> torch.Tensor:
    """What `model` predicts for `tiny_inputs` and `tiny_layout`."""
    return model(**tiny_inputs(), layout=tiny_layout(), **kwargs).sample


def trained_adapter(model: torch.nn.Module, adapter_name: str = "default", seed: int = 5) -> None:
    """Stand for a training: both factors are non-zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model, adapter_name):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
