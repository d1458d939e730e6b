"""Parts of small stock pipelines: real classes of diffusers and transformers at a tiny config."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

# As the published template reads a chat of one message.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
VOCABULARY = 256 + len(SPECIAL)


def qwen_tokenizer() -> Qwen2TokenizerFast:
    """The real class, with one token a byte."""
    vocab = {token: number for number, token in enumerate([*sorted(ByteLevel.alphabet()), *SPECIAL])}
    tokenizer = Qwen2TokenizerFast(vocab=vocab, merges=[], additional_special_tokens=SPECIAL[1:])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def qwen3_config(*, width: int = 8, layers: int = 2) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    )


def qwen3(*, width: int = 8, layers: int = 2, head: bool = True) -> Any:
    config = qwen3_config(width=width, layers=layers)
    return (Qwen3ForCausalLM(config) if head else Qwen3Model(config)).eval()


def flux2_vae() -> AutoencoderKLFlux2:
    """FLUX.2's, with statistics of its batch norm that are not 0 and 1. A cell covers 2 x 2 pixels."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()


def kl_vae() -> AutoencoderKL:
    """A cell covers 8 x 8 pixels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).eval()


def scheduler(**changes: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**changes)


def seeded(seed: int = 0) -> Any:
    """A context in which torch's random numbers are those of `seed`; the caller's are not used up."""
    fork = torch.random.fork_rng(devices=[])

    class Seeded:
        def __enter__(self) -> None:
            fork.__enter__()
            torch.manual_seed(seed)

        def __exit__(self, *error: Any) -> None:
            fork.__exit__(*error)

    return Seeded()
