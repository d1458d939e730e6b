"""A small FLUX of the real classes, for tests: transformer, T5 and CLIP encoders, pipeline."""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from mmdit_lora.models.flux import LayoutFluxTransformer2DModel
from tests.tiny import tiny_tokenizer, tiny_vae

if TYPE_CHECKING:
    from mmdit_lora.pipelines.flux import LayoutFluxPipeline

# Two heads of 16 on 8 x 8 = 64 image tokens; each packs 2 x 2 cells of 4 latent channels.
FLUX_CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def tiny_flux_transformer(*, open_gates: bool = True, seed: int = 0, **changes: Any) -> LayoutFluxTransformer2DModel:
    """A small `LayoutFluxTransformer2DModel` in eval mode; with open gates it stands for a trained layout stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LayoutFluxTransformer2DModel(**{**FLUX_CONFIG, **changes})
        if open_gates:
            for block in (*model.transformer_blocks, *model.single_transformer_blocks):
                stream = getattr(block, "layout_stream", None)  # single blocks have one only by choice
                if stream is not None:
                    torch.nn.init.normal_(stream.out_proj.weight, std=0.5)
                    torch.nn.init.normal_(stream.out_proj.bias, std=0.1)
            for name in ("null_phrase", "null_box"):
                null = getattr(model.layout_processor, name, None)
                if null is not None:
                    torch.nn.init.normal_(null)
    return model.eval()


def tiny_flux_inputs(batch: int = 2, *, seed: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Everything that the base's forward takes, for 8 x 8 image tokens and 7 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    return {
        "hidden_states": torch.randn(batch, 64, 16, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 7, 24, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch, 16, generator=generator).to(dtype),
        "timestep": torch.linspace(0.9, 0.3, batch),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": torch.stack([torch.zeros(8, 8), rows, columns], dim=-1).reshape(64, 3),
        "txt_ids": torch.zeros(7, 3),
    }


def tiny_t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with a vocabulary of letters; a word's first letter carries the space."""
    letters = [(mark + letter, -3.0) for mark in ("", "▁") for letter in string.ascii_lowercase]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0), *letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def tiny_t5_encoder(width: int = 24) -> T5EncoderModel:
    """Two layers, `width` wide."""
    config = T5Config(
        vocab_size=64,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    return T5EncoderModel(config).eval()


def tiny_flux_pipeline(
    folder: Path, transformer: LayoutFluxTransformer2DModel | None = None, **options: Any
) -> LayoutFluxPipeline:
    """A whole pipeline that paints 32 x 32 pixels. `folder` takes the tokenizer's files."""
    from mmdit_lora.pipelines.flux import LayoutFluxPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        vae = tiny_vae()
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=260,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        t5 = tiny_t5_encoder()
    return LayoutFluxPipeline(
        transformer=tiny_flux_transformer() if transformer is None else transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=clip.eval(),
        tokenizer=tiny_tokenizer(folder),
        text_encoder_2=t5,
        tokenizer_2=tiny_t5_tokenizer(),
        **{"max_sequence_length": 12, "default_sample_size": 16, **options},
    )
