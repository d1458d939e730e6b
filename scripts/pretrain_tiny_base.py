"""Make the embedded base, `data/tiny_base`, from nothing: tokenizer, text encoders, VAE, transformer.

    uv run python scripts/pretrain_tiny_base.py --work .work/tiny_base --out data/tiny_base

Every stage writes to `--work` as it goes and takes up again from there after a break. About 15 minutes for the VAE and
40 minutes for the transformer on two CPU cores. The classes are those of a full-size SD3; only the config is small.

A base of half the width, with the same VAE and text encoders, for the studies that compare widths:

    uv run python scripts/pretrain_tiny_base.py --width 64 --parts data/tiny_base --work .work/narrow --out data/tiny_base_narrow
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from mmdit_lora.config.ranges import COUNT, Range
from mmdit_lora.data.collate import collate_layouts
from mmdit_lora.data.records import read_dataset
from mmdit_lora.data.shapes import DOMAINS, make_scene, write_dataset
from mmdit_lora.evaluation.detectors.shapes import measure
from mmdit_lora.evaluation.evaluate import evaluate
from mmdit_lora.files import atomic_folder, write_json
from mmdit_lora.flow import sample_timesteps
from mmdit_lora.models import LayoutInputs, LayoutSD3Transformer2DModel
from mmdit_lora.pipelines import LayoutStableDiffusion3Pipeline, SamplingConfig, generate, load_pipeline, quiet
from mmdit_lora.training.checkpoint import load_optimizer, optimizer_writer
from mmdit_lora.training.loss import Batch, flow_matching_loss
from mmdit_lora.visual import contact_sheet, draw_boxes, phrase_colors, save_png

TRAIN_SEED, HELD_OUT_SEED = 1, 2
TEXT_WIDTH, TEXT_TOKENS = 64, 32
# So that captions of one's own images are not cut into bytes; whatever is not here still is, and works.
COMMON_WORDS = """
a an the of and in on with at by to from is are there this that photo image image drawing background scene view
close up small large big tiny round long tall wide thin thick light dark bright black white brown gold silver left
right top bottom middle center corner side one two three four five six seven eight nine ten no some many few person
man woman child people dog cat bird horse cow sheep car bus truck bicycle motorcycle train boat airplane traffic sign
street house building tree flower grass sky water sea mountain road table chair bed sofa book bottle cup bowl plate
apple banana orange cake food cell cells blood platelet platelets microscope plasma tissue stained window door wall
floor text title logo button banner page layout column header footer poster product shoe shirt hat bag hand face eye
head
""".split()  # noqa: SIM905  # a list would be a line for every word


def log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


# -- text ----------------------------------------------------------------------------------------------------------------


def make_text(work: Path) -> None:
    """A byte-level BPE tokenizer and two frozen CLIP text encoders with random weights.

    Random weights of this scale keep words apart: colour and shape of a phrase are linearly separable in the output.
    """
    if (work / "text_encoder_2").exists():
        return
    captions = [make_scene(DOMAINS["mixed"], TRAIN_SEED, index)[1].caption for index in range(2000)]
    words = CLIPTokenizer().train_new_from_iterator([captions, COMMON_WORDS * 5], vocab_size=1400)
    bpe = json.loads(words.backend_tokenizer.to_str())["model"]
    alphabet = sorted(ByteLevel.alphabet())
    merges = [tuple(pair) for pair in bpe["merges"]]
    # As in CLIP: bytes, bytes that end a word, merges, then the two special tokens. No text is unknown.
    names = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    vocab = {name: number for number, name in enumerate([*dict.fromkeys(names), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)
    assert tokenizer.unk_token_id not in tokenizer("zébra ☂ crosswalk 42", add_special_tokens=False)["input_ids"]
    for number, suffix in enumerate(("", "_2")):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        encoder = CLIPTextModelWithProjection(config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if "embedding" in name:
                    parameter.normal_(std=1.0 if "token" in name else 0.3, generator=generator)
                elif parameter.ndim == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        tokenizer.save_pretrained(work / f"tokenizer{suffix}")
        encoder.half().save_pretrained(work / f"text_encoder{suffix}")
    log(f"text: {len(tokenizer)} tokens")


# -- VAE -----------------------------------------------------------------------------------------------------------------


def texture(seed: int, size: int = 64) -> np.ndarray:
    """Smooth colour noise at a few scales, (size, size, 3) uint8: so that the VAE also carries photographs."""
    rng = np.random.default_rng([seed, 1])
    out = rng.uniform(0, 255, 3) * np.ones((size, size, 3))
    for _ in range(rng.integers(1, 4)):
        field = gaussian_filter(rng.normal(size=(size, size)), sigma=float(np.exp(rng.uniform(0, 2.5))), mode="wrap")
        field = field / field.std()
        if rng.random() < 0.5:
            field = np.tanh(3 * field)
        out += field[..., None] * rng.normal(scale=30, size=3)
    return np.clip(out, 0, 255).astype(np.uint8)


def vae_images(count: int) -> Tensor:
    """(count, 3, 64, 64) uint8: scenes of every domain, and textures."""
    shares = {"mixed": 0.5, "page": 0.18, "dense": 0.12}
    parts = [
        np.asarray(make_scene(DOMAINS[domain], TRAIN_SEED, index)[0])
        for domain, share in shares.items()
        for index in range(int(share * count))
    ]
    parts += [texture(index) for index in range(count - len(parts))]
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2)


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=False,
        # One 1x1 convolution in front of the decoder takes the normalisation of the latents back, exactly at borders too.
        use_post_quant_conv=True,
        mid_block_add_attention=False,
    )


def train_vae(
    work: Path,
    new: Callable[[], Any],
    normalise: Callable[[Any, Tensor], None],
    steps: int,
    batch: int = 16,
    rate: float = 2e-3,
    *,
    bf16: bool = False,
) -> None:
    """Train the VAE that `new` makes; `normalise` is given it and images (n, 3, 64, 64) uint8 before it is saved."""
    if (work / "vae").exists():
        return
    torch.manual_seed(0)
    images = vae_images(14_000)
    log(f"vae: {len(images)} images")
    vae = new()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    step, curve = resume(work / "vae_training", vae, [optimizer])
    while step < steps:
        generator = torch.Generator().manual_seed(step)
        x = images[torch.randint(len(images), (batch,), generator=generator)].float() / 127.5 - 1
        for group in optimizer.param_groups:  # constant, then a cosine to 0 over the second half
            group["lr"] = rate * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * max(0, 2 * step / steps - 1))) / 2
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            posterior = vae.encode(x).latent_dist
            out = vae.decode(posterior.sample(generator=generator)).sample.float()
        squared = F.mse_loss(out, x)
        loss = F.l1_loss(out, x) + 2 * squared + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            curve.append({"step": step, "psnr_db": 10 * math.log10(4 / squared.item())})
        if step % 100 == 0:
            save_progress(work / "vae_training", vae, [optimizer], step, curve)
            log(f"vae: step {step}/{steps}, {curve[-1]['psnr_db']:.1f} dB")
    normalise(vae, images)
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Put mean 0 and standard deviation 1 per latent channel into the weights, so that scaling_factor 1 is right."""
    modes = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mode() for x in images[::7].split(50)])
    mean, std = modes.mean(dim=(0, 2, 3)), modes.std(dim=(0, 2, 3))
    out, back = vae.encoder.conv_out, vae.post_quant_conv
    channels = len(mean)
    out.weight[:channels] /= std[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) / std
    out.bias[channels:] -= 2 * std.log()  # the second half of the channels is the log-variance
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[None, :, None, None]


def take_parts(base: Path, work: Path) -> None:
    """VAE, text encoders and tokenizers of another base, and the VAE's curve, where the stages look for them."""
    for name in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae"):
        shutil.copytree(base / name, work / name, dirs_exist_ok=True)
    curve = json.loads((base / "training_log.json").read_text())["curves"]["vae"]
    (work / "vae_training").mkdir(exist_ok=True)
    write_json(work / "vae_training" / "progress.json", {"step": curve[-1]["step"], "curve": curve})


# -- transformer ---------------------------------------------------------------------------------------------------------


def new_transformer(width: int) -> LayoutSD3Transformer2DModel:
    return LayoutSD3Transformer2DModel(
        sample_size=32,
        patch_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def assemble(work: Path, transformer: LayoutSD3Transformer2DModel) -> LayoutStableDiffusion3Pipeline:
    pipe = LayoutStableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(work / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(work / "text_encoder_2", dtype=torch.float32),
        tokenizer_2=CLIPTokenizer.from_pretrained(work / "tokenizer_2"),
        max_sequence_length=1,  # there is no T5, and 256 zero tokens would be most of the work
        num_inference_steps=20,
        guidance_scale=2.5,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Scenes:
    """Encoded scenes in memory: latents fp16, captions and phrases as rows of tables."""

    def __init__(self, pipe: LayoutStableDiffusion3Pipeline, count: int) -> None:
        scenes = [make_scene(DOMAINS["mixed"], TRAIN_SEED, index) for index in range(count)]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in scenes])).permute(0, 3, 1, 2)
        layouts = [layout for _, layout in scenes]
        with torch.no_grad():
            latents = [pipe.vae.encode(x.float() / 127.5 - 1).latent_dist.mode().half() for x in pixels.split(50)]
            self.latents = torch.cat(latents)
            captions = ["", *dict.fromkeys(layout.caption for layout in layouts)]
            encoded = [self._encode(pipe, captions[i : i + 200]) for i in range(0, len(captions), 200)]
            self.prompts, self.pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
            phrases = sorted({box.phrase for layout in layouts for box in layout.boxes})
            self.layouts = collate_layouts(
                layouts, dict(zip(phrases, pipe.encode_phrases(phrases), strict=True)), phrase_dim=128
            )
        row = {caption: number for number, caption in enumerate(captions)}
        self.caption_rows = torch.tensor([row[layout.caption] for layout in layouts])

    @staticmethod
    def _encode(pipe: LayoutStableDiffusion3Pipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
        prompts, _, pooled, _ = pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=1
        )
        return prompts, pooled

    def batch(self, index: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor, Tensor, LayoutInputs]:
        """Latents, prompt and pooled embeddings, layouts; where `dropped` (B,) the text is empty and boxes are masked."""
        rows = self.caption_rows[index].masked_fill(dropped, 0)
        layouts = self.layouts[index]
        slots = int(layouts.mask.sum(1).max())
        mask = layouts.mask & ~dropped[:, None]
        layouts = LayoutInputs(layouts.boxes[:, :slots], layouts.phrase_embeds[:, :slots], mask[:, :slots])
        return self.latents[index].float(), self.prompts[rows], self.pooled[rows], layouts


def train_transformer(work: Path, steps: int, count: int, *, width: int, batch: int = 32, rate: float = 1.3e-3) -> None:
    torch.manual_seed(0)
    model = new_transformer(width)
    for block in model.transformer_blocks:  # trained from nothing: no base to be kept as it is, so the gates may open
        torch.nn.init.normal_(block.layout_stream.out_proj.weight, std=0.02)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    both = torch.nn.ModuleDict({"model": model, "ema": ema})
    step, curve = resume(work / "transformer_training", both, [optimizer])
    pipe = assemble(work, ema)
    log("transformer: encoding scenes")
    scenes = Scenes(pipe, count)
    held_out = [make_scene(DOMAINS["mixed"], HELD_OUT_SEED, index)[1] for index in range(64)]
    recent: list[float] = []
    log(f"transformer: {count} scenes, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    while step < steps:
        for group in optimizer.param_groups:  # warm-up, constant, then a cosine to 2 % over the second half
            fall = 0.02 + 0.98 * (1 + math.cos(math.pi * max(0, 2 * step / steps - 1))) / 2
            group["lr"] = rate * min(1, (step + 1) / 200) * fall
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(count, (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.1
        x0, prompt, pooled, layouts = scenes.batch(index, dropped)
        # First the details too, then mostly where things are decided: towards noise.
        t = sample_timesteps(batch, logit_mean=0.3 if step < 0.4 * steps else 1.2, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = flow_matching_loss(model, Batch(x0, noise, t, {"embeds": prompt, "pooled": pooled}, layouts)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            decay = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        recent.append(loss.item())
        if step % 100 == 0:
            entry = {"step": step, "loss": float(np.mean(recent))}
            recent.clear()
            if step % 1500 == 0 or step == steps:
                entry |= measure(
                    generate(pipe, held_out, SamplingConfig(steps=20, guidance_scale=2.5)), held_out
                ).to_dict()
            curve.append(entry)
            log(f"transformer: {json.dumps(entry)}")
        if step % 250 == 0 or step == steps:
            save_progress(work / "transformer_training", both, [optimizer], step, curve)
    ema.save_pretrained(work / "transformer")


# -- the folder ----------------------------------------------------------------------------------------------------------


def publish(work: Path, out: Path) -> None:
    """Write the base in fp16, then measure that very folder and write its card."""
    pipe = assemble(work, LayoutSD3Transformer2DModel.from_pretrained(work / "transformer"))
    for component in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        component.half()
    curves = {
        stage: json.loads((work / f"{stage}_training" / "progress.json").read_text())["curve"]
        for stage in ("vae", "transformer")
    }
    with atomic_folder(out) as temporary:
        with quiet():
            pipe.save_pretrained(temporary)
        reports = {}
        saved = load_pipeline(str(temporary))
        for domain in ("basic", "mixed"):
            with tempfile.TemporaryDirectory() as scratch:
                write_dataset(f"{scratch}/data", DOMAINS[domain], count=256, seed=HELD_OUT_SEED)
                evaluation = evaluate(saved, read_dataset(f"{scratch}/data"), SamplingConfig(), seed=0)
            reports[domain] = evaluation.to_dict()
            log(f"{domain}: {json.dumps(reports[domain]['base'])}")
            shown = [
                draw_boxes(p, b, colors=phrase_colors(evaluation.layouts))
                for p, b in zip(evaluation.conditions["base"].images[:16], evaluation.layouts, strict=False)
            ]
            save_png(contact_sheet(shown), temporary / f"samples_{domain}.png")
        write_json(temporary / "training_log.json", {"curves": curves, "evaluation": reports})
        plot_curves(curves, temporary / "curves.png")
        (temporary / "README.md").write_text(card(curves, reports, saved.transformer, out), encoding="utf-8")


def plot_curves(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    steps = [entry["step"] for entry in curves["vae"]]
    axes[0].plot(steps, [entry["psnr_db"] for entry in curves["vae"]], color="#0072B2")
    axes[0].set(title="VAE: reconstruction of one batch", xlabel="step", ylabel="PSNR (dB)")
    steps = [entry["step"] for entry in curves["transformer"]]
    axes[1].plot(steps, [entry["loss"] for entry in curves["transformer"]], color="#0072B2")
    axes[1].set(title="transformer: training loss", xlabel="step", ylabel="velocity error")
    measured = [entry for entry in curves["transformer"] if "miou" in entry]
    for name, color in (("miou", "#0072B2"), ("iou50", "#56B4E9"), ("color_acc", "#D55E00"), ("shape_acc", "#009E73")):
        axes[2].plot([e["step"] for e in measured], [e[name] for e in measured], "o-", label=name, color=color)
    axes[2].set(title="64 held-out layouts, 1 to 10 boxes", xlabel="step", ylim=(0, 1.02))
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def card(
    curves: dict[str, list[dict[str, float]]],
    reports: dict[str, dict],
    transformer: LayoutSD3Transformer2DModel,
    out: Path,
) -> str:
    def row(name: str, figures: dict[str, float]) -> str:
        values = " | ".join(f"{figures[key]:.3f}" for key in ("miou", "iou50", "color_acc", "shape_acc"))
        return f"| {name} | {values} |"

    head = ["| | mIoU | IoU50 | colour | shape |", "| --- | --- | --- | --- | --- |"]
    names = {"base": "this base", "ground_truth": "ground truth through the VAE", "shuffled": "shuffled layouts"}
    basic, mixed = reports["basic"], reports["mixed"]["by_boxes"]
    own = [row(text, basic[side]) for side, text in names.items()]
    many = [row(f"{group} boxes, {text}", mixed[group][side]) for group in mixed for side, text in names.items()]
    millions = sum(p.numel() for p in transformer.parameters()) / 1e6
    newline = "\n"
    name = (
        "" if transformer.inner_dim == 128 else f", width {transformer.inner_dim}: for the studies that compare widths"
    )
    return f"""---
license: apache-2.0
library_name: diffusers
---

# The embedded base{name}

A Stable Diffusion 3 pipeline with a layout stream, 64 x 64 px, made from nothing by `scripts/pretrain_tiny_base.py` on
procedural scenes: 1 to 10 coloured shapes on grey, with captions, boxes and phrases. It exists so that every command of
this project runs in minutes on a CPU. The classes are those of a full-size SD3; only the config is small: a transformer
of {transformer.config.num_layers} blocks, width {transformer.inner_dim} ({millions:.2f} M parameters), a VAE of two levels, two frozen CLIP text encoders with random weights.

It paints coloured shapes and nothing else: it is no model of photographs.

## How well it obeys layouts

Held-out scenes of the domain `basic` (256 images, 1 to 4 boxes of 14 to 32 px), 20 steps, guidance 2.5:

{newline.join(head + own)}

The domain `mixed`, on which it was trained (256 images, sides from 9 px, some overlap), by number of boxes:

{newline.join(head + many)}

    mmdit-lora data make shapes --out outputs/basic --count 256 --seed {HELD_OUT_SEED} --domain basic
    mmdit-lora evaluate --base {out} --data outputs/basic --out outputs/basic_report

![samples](samples_basic.png)

## Training

VAE: {curves["vae"][-1]["step"]} steps of 16 images; scenes of all domains and smooth colour noise. Transformer: {curves["transformer"][-1]["step"]:,}
steps of 32 scenes on two CPU cores, EMA weights. The log is `training_log.json`.

![curves](curves.png)
"""


# -- both ----------------------------------------------------------------------------------------------------------------


def save_progress(
    folder: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int, curve: list
) -> None:
    with atomic_folder(folder) as temporary:
        save_file(model.state_dict(), temporary / "model.safetensors")
        for number, optimizer in enumerate(optimizers):
            optimizer_writer(optimizer)(temporary / f"optimizer_{number}.safetensors")
        write_json(temporary / "progress.json", {"step": step, "curve": curve})


def resume(folder: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[int, list]:
    if not folder.exists():
        return 0, []
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for number, optimizer in enumerate(optimizers):
        load_optimizer(optimizer, folder / f"optimizer_{number}.safetensors")
    progress = json.loads((folder / "progress.json").read_text())
    log(f"{folder.name}: resumed at step {progress['step']}")
    return progress["step"], progress["curve"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(".work/tiny_base"))
    parser.add_argument("--out", type=Path, default=Path("data/tiny_base"))
    parser.add_argument("--vae-steps", type=COUNT.parse, default=1150)
    parser.add_argument("--steps", type=COUNT.parse, default=9_000, help="of the transformer")
    parser.add_argument("--scenes", type=COUNT.parse, default=24_000)
    parser.add_argument(
        "--width", type=Range(32, 8192, whole=True).parse, default=128, help="of the transformer; a multiple of 32"
    )
    parser.add_argument("--parts", type=Path, default=None, help="a base to take the VAE and the text encoders from")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.parts is not None:
        take_parts(args.parts, args.work)
    make_text(args.work)
    train_vae(args.work, new_vae, normalise_latents, args.vae_steps)
    if not (args.work / "transformer").exists():
        train_transformer(args.work, args.steps, args.scenes, width=args.width)
    publish(args.work, args.out)


if __name__ == "__main__":
    main()
