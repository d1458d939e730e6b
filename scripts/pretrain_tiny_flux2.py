"""Make the second embedded base, `data/tiny_flux2`, from nothing: a small FLUX.2 klein that knows text and no layout.

    uv run python scripts/pretrain_tiny_flux2.py --work .work/tiny_flux2 --out data/tiny_flux2

Stock classes throughout: `Flux2Transformer2DModel`, `AutoencoderKLFlux2`, `Qwen3ForCausalLM`, `Flux2KleinPipeline`; only the
configs are small. The transformer learns captions alone, as a published base does; its layout stream comes afterwards, by
`mmdit-lora train configs/tiny_flux2_stream.yaml`. Every stage writes to `--work` as it goes and takes up again from there
after a break. The VAE starts from the two levels of the first embedded base's and gets a third.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from pretrain_tiny_base import (
    COMMON_WORDS,
    HELD_OUT_SEED,
    TRAIN_SEED,
    log,
    resume,
    save_progress,
    train_vae,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mmdit_lora.config.ranges import COUNT
from mmdit_lora.data.shapes import DOMAINS, make_scene, phrase_attributes
from mmdit_lora.evaluation.detectors.shapes import detect_all
from mmdit_lora.files import atomic_folder, write_json
from mmdit_lora.flow import sample_timesteps
from mmdit_lora.layout import Layout
from mmdit_lora.models.latents import batch_norm_latents, pack
from mmdit_lora.models.stream_families import STREAM_FAMILIES
from mmdit_lora.models.weight_files import strip_local_paths
from mmdit_lora.visual import contact_sheet, save_png

FAMILY = STREAM_FAMILIES["flux2"]
DOMAIN = "sparse"
TEXT_WIDTH, TEXT_TOKENS = 64, 40
STEPS, GUIDANCE = 20, 5.0
MUON_RATE = 6e-3
# As the published template makes a chat of one message, without thinking.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


# -- text ----------------------------------------------------------------------------------------------------------------


def make_text(work: Path) -> None:
    """A byte-level BPE tokenizer and a frozen Qwen3 with random weights, as deep as klein's reading of it (27 layers).

    Every layer adds little to what the one before it gave, so a token's state keeps its word and takes up its neighbours'.
    """
    if (work / "text_encoder").exists():
        return
    captions = [make_scene(DOMAINS["mixed"], TRAIN_SEED, index)[1].caption for index in range(2000)]
    phrases = [f"a {color}" for caption in captions for color in caption.split()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    chats = [f"user\nassistant\n<think>\n\n</think>\n\n {' '.join(COMMON_WORDS)}"] * 5
    bpe.train_from_iterator([*captions, *phrases, *chats], trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        additional_special_tokens=SPECIAL[1:],
        pad_token=SPECIAL[0],
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=27,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    encoder = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(generator=generator)
            elif parameter.ndim == 2:
                small = 0.15 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                parameter.normal_(std=small * parameter.shape[1] ** -0.5, generator=generator)
    tokenizer.save_pretrained(work / "tokenizer")
    encoder.half().save_pretrained(work / "text_encoder")
    log(f"text: {len(tokenizer)} tokens, {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters")


# -- VAE -----------------------------------------------------------------------------------------------------------------


def new_vae(start: Path) -> AutoencoderKLFlux2:
    """Three levels, a cell of 4 pixels, 16 channels; the outer two levels as those of the VAE at `start`."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    own, given = vae.state_dict(), AutoencoderKL.from_pretrained(start).state_dict()
    for name, value in given.items():
        # The decoder counts its levels from the inside.
        for level in (1, 0):
            name = name.replace(f"decoder.up_blocks.{level}.", f"decoder.up_blocks.{level + 1}.")
        if name in own and own[name].shape == value.shape:
            own[name] = value.float()
    vae.load_state_dict(own)
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKLFlux2, images: Tensor) -> None:
    """Mean and variance of 2 x 2 cells into the batch norm, by which klein's pipeline normalises."""
    modes = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mode() for x in images[::7].split(50)])
    cells = pack(modes).flatten(0, 1)
    vae.bn.running_mean.copy_(cells.mean(0))
    vae.bn.running_var.copy_(cells.var(0))


# -- transformer ---------------------------------------------------------------------------------------------------------


def new_transformer() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=3 * TEXT_WIDTH,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )


def assemble(work: Path, transformer: Flux2Transformer2DModel) -> Flux2KleinPipeline:
    pipe = Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=AutoencoderKLFlux2.from_pretrained(work / "vae", torch_dtype=torch.float32),
        text_encoder=Qwen3ForCausalLM.from_pretrained(work / "text_encoder", dtype=torch.float32),
        tokenizer=Qwen2TokenizerFast.from_pretrained(work / "tokenizer"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Scenes:
    """Encoded scenes in memory: latents, and captions as rows of a table, both fp16; row 0 is the empty caption."""

    @torch.no_grad()
    def __init__(self, pipe: Flux2KleinPipeline, count: int) -> None:
        scenes = [make_scene(DOMAINS[DOMAIN], TRAIN_SEED, index) for index in range(count)]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in scenes])).permute(0, 3, 1, 2)
        self.latents = torch.cat([batch_norm_latents(pipe.vae, x.float() / 127.5 - 1).half() for x in pixels.split(50)])
        captions = list(dict.fromkeys(["", *(layout.caption for _, layout in scenes)]))
        row = {caption: number for number, caption in enumerate(captions)}
        self.rows = torch.tensor([row[layout.caption] for _, layout in scenes])
        parts = [captions[i : i + 200] for i in range(0, len(captions), 200)]
        self.embeds = torch.cat([FAMILY.captions(pipe, part, TEXT_TOKENS)["embeds"].half() for part in parts])

    def batch(self, index: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) and caption embeddings (B, S, E); where `dropped` (B,) the caption is empty."""
        rows = self.rows[index].masked_fill(dropped, 0)
        return self.latents[index].float(), self.embeds[rows].float()


def velocity(model: Flux2Transformer2DModel, x_t: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
    answer = model(**FAMILY.inputs(model, x_t, t, {"embeds": embeds}, 1.0), return_dict=False)[0]
    return FAMILY.outputs(answer, *x_t.shape[-2:])


def train_transformer(work: Path, steps: int, count: int, *, batch: int = 32, rate: float = 1.3e-3) -> None:
    torch.manual_seed(0)
    model = new_transformer()
    ema = copy.deepcopy(model).requires_grad_(False)
    # Muon for the matrices of the blocks: at 400 steps a loss of 0.38, AdamW alone 0.53.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "blocks." not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.01),
    ]
    both = torch.nn.ModuleDict({"model": model, "ema": ema})
    step, curve = resume(work / "transformer_training", both, optimizers)
    pipe = assemble(work, ema)
    log("transformer: encoding scenes")
    scenes = Scenes(pipe, count)
    held_out = [make_scene(DOMAINS[DOMAIN], HELD_OUT_SEED, index)[1] for index in range(64)]
    recent: list[float] = []
    log(f"transformer: {count} scenes, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    while step < steps:
        # Warm-up, constant, then a cosine to 2 % over the second half.
        fall = 0.02 + 0.98 * (1 + math.cos(math.pi * max(0, 2 * step / steps - 1))) / 2
        for group, peak in (
            (group, peak)
            for each, peak in zip(optimizers, (MUON_RATE, rate), strict=True)
            for group in each.param_groups
        ):
            group["lr"] = peak * min(1, (step + 1) / 100) * fall
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(count, (batch,), generator=generator)
        x0, embeds = scenes.batch(index, torch.rand(batch, generator=generator) < 0.1)
        t = sample_timesteps(batch, logit_mean=0.3 if step < 0.4 * steps else 1.0, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        loss = F.mse_loss(velocity(model, x_t, t, embeds), noise - x0)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(
                list(ema.parameters()), list(model.parameters()), 1 - min(0.999, (1 + step) / (10 + step))
            )
        recent.append(loss.item())
        if step % 100 == 0:
            entry: dict[str, Any] = {"step": step, "loss": float(np.mean(recent))}
            recent.clear()
            if step % 1500 == 0 or step == steps:
                entry |= caption_fidelity(paint(pipe, held_out), held_out)
                save_png(contact_sheet(paint(pipe, held_out[:16])), work / "samples.png")
            curve.append(entry)
            log(f"transformer: {json.dumps(entry)}")
        if step % 250 == 0 or step == steps:
            save_progress(work / "transformer_training", both, optimizers, step, curve)
    ema.save_pretrained(work / "transformer")


# -- fidelity to captions ------------------------------------------------------------------------------------------------


def paint(pipe: Flux2KleinPipeline, layouts: Sequence[Layout], batch: int = 32) -> list[Image.Image]:
    """Images of the captions alone, by the stock pipeline and its own guidance."""
    images: list[Image.Image] = []
    for start in range(0, len(layouts), batch):
        prompts = [layout.caption for layout in layouts[start : start + batch]]
        size = DOMAINS[DOMAIN].size
        images += pipe(
            prompt=prompts,
            height=size,
            width=size,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=TEXT_TOKENS,
            generator=[torch.Generator().manual_seed(start + n) for n in range(len(prompts))],
        ).images
    return images


def caption_fidelity(images: Sequence[Image.Image], layouts: Sequence[Layout]) -> dict[str, float]:
    """What a caption names against what the exact reader finds, wherever it stands.

    Returns:
        color: share of the named objects whose colour is found, each object found counted once. object: whose colour and
        shape are found together. extra: objects found beyond the number named, over the number named.
    """
    named_objects = colors = objects = extra = 0
    for found, layout in zip(detect_all(images), layouts, strict=True):
        named = Counter(attributes for box in layout.boxes if (attributes := phrase_attributes(box.phrase)))
        seen = Counter((d.color, d.shape) for d in found)
        named_colors, seen_colors = Counter(c for c, _ in named.elements()), Counter(c for c, _ in seen.elements())
        named_objects += named.total()
        colors += (named_colors & seen_colors).total()
        objects += (named & seen).total()
        extra += max(0, len(found) - named.total())
    return {"color": colors / named_objects, "object": objects / named_objects, "extra": extra / named_objects}


# -- the folder ----------------------------------------------------------------------------------------------------------


def publish(work: Path, out: Path) -> None:
    """Write the base in fp16, then measure that very folder and write its card."""
    pipe = assemble(work, Flux2Transformer2DModel.from_pretrained(work / "transformer"))
    for component in (pipe.transformer, pipe.vae, pipe.text_encoder):
        component.half()
    curves = {
        stage: json.loads((work / f"{stage}_training" / "progress.json").read_text())["curve"]
        for stage in ("vae", "transformer")
    }
    held_out = [make_scene(DOMAINS[DOMAIN], HELD_OUT_SEED, index)[1] for index in range(256)]
    with atomic_folder(out) as temporary:
        pipe.save_pretrained(temporary)
        index = temporary / "model_index.json"
        stated = {"max_sequence_length": TEXT_TOKENS, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        write_json(index, json.loads(index.read_text()) | stated | {"default_sample_size": 16})
        strip_local_paths(temporary)
        saved = Flux2KleinPipeline.from_pretrained(temporary, torch_dtype=torch.float32)
        saved.set_progress_bar_config(disable=True)
        images = paint(saved, held_out)
        figures = caption_fidelity(images, held_out)
        log(json.dumps(figures))
        captions = [layout.caption for layout in held_out[:16]]
        save_png(contact_sheet(images[:16], captions=captions), temporary / "samples.png")
        write_json(temporary / "training_log.json", {"curves": curves, "captions": figures})
        plot_curves(curves, temporary / "curves.png")
        (temporary / "README.md").write_text(card(curves, figures, saved.transformer), encoding="utf-8")


def plot_curves(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    vae, transformer = curves["vae"], curves["transformer"]
    axes[0].plot([e["step"] for e in vae], [e["psnr_db"] for e in vae], color="#0072B2")
    axes[0].set(title="VAE: reconstruction of one batch", xlabel="step", ylabel="PSNR (dB)")
    axes[1].plot([e["step"] for e in transformer], [e["loss"] for e in transformer], color="#0072B2")
    axes[1].set(title="transformer: training loss", xlabel="step", ylabel="velocity error", yscale="log")
    measured = [entry for entry in transformer if "color" in entry]
    for name, color in (("color", "#D55E00"), ("object", "#009E73"), ("extra", "#999999")):
        axes[2].plot([e["step"] for e in measured], [e[name] for e in measured], "o-", label=name, color=color)
    axes[2].set(title="64 held-out captions, 1 to 4 objects", xlabel="step", ylim=(0, 1.02))
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def card(
    curves: dict[str, list[dict[str, float]]], figures: dict[str, float], transformer: Flux2Transformer2DModel
) -> str:
    millions = sum(p.numel() for p in transformer.parameters()) / 1e6
    return f"""---
license: apache-2.0
library_name: diffusers
---

# The second embedded base: a small FLUX.2 klein without a layout stream

A `Flux2KleinPipeline` of stock diffusers classes, 64 x 64 px, made from nothing by `scripts/pretrain_tiny_flux2.py`: a transformer of
{transformer.config.num_layers} double-stream and {transformer.config.num_single_layers} single-stream blocks, width {transformer.inner_dim} ({millions:.2f} M parameters), an `AutoencoderKLFlux2` of three levels, a frozen
`Qwen3ForCausalLM` of 27 layers with random weights. It was trained on captions alone ("a red circle and a blue cross on a dark
background"), as a published base is, and knows no boxes. It shows the whole way for such a base, a generic layout stream and then
an adapter on it, by three commands on a CPU:

    mmdit-lora train configs/tiny_flux2_stream.yaml
    mmdit-lora train configs/tiny_flux2.yaml
    mmdit-lora evaluate --base data/tiny_flux2 --stream outputs/tiny_flux2/stream/stream --adapter outputs/tiny_flux2/lora/adapter --data "shapes://page?count=256&seed=21" --out outputs/tiny_flux2/report

It paints coloured shapes on grey and nothing else: it is no model of photographs.

## What it paints of a caption

256 held-out captions of 1 to 4 objects, {STEPS} steps, guidance {GUIDANCE:g}, by the stock pipeline; the exact reader finds the objects, wherever they stand:

| | share of the objects that a caption names |
| --- | --- |
| found by their colour | {figures["color"]:.3f} |
| found by colour and shape together | {figures["object"]:.3f} |
| found beyond those named | {figures["extra"]:.3f} |

![samples](samples.png)

## Training

VAE: {curves["vae"][-1]["step"]} steps of 16 images, from the outer two levels of `data/tiny_base`'s. Transformer: {curves["transformer"][-1]["step"]:,} steps of 32 scenes of the
domain `{DOMAIN}` on two CPU cores, Muon and AdamW, EMA weights. The log is `training_log.json`.

![curves](curves.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(".work/tiny_flux2"))
    parser.add_argument("--out", type=Path, default=Path("data/tiny_flux2"))
    parser.add_argument("--vae-steps", type=COUNT.parse, default=700)
    parser.add_argument("--steps", type=COUNT.parse, default=16_000, help="of the transformer")
    parser.add_argument("--scenes", type=COUNT.parse, default=24_000)
    parser.add_argument("--start", type=Path, default=Path("data/tiny_base/vae"), help="VAE of the outer levels")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    make_text(args.work)
    train_vae(args.work, lambda: new_vae(args.start), normalise_latents, args.vae_steps, bf16=True)
    if not (args.work / "transformer").exists():
        train_transformer(args.work, args.steps, args.scenes)
    publish(args.work, args.out)


if __name__ == "__main__":
    main()
