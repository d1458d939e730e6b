"""Bases that diffusers has as modular blocks alone, opened, called and saved as its other pipelines are."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import numpy as np
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from peft import PeftModel
from torch import Tensor

from mmdit_lora.files import write_json
from mmdit_lora.hub import HUB_OPTIONS, MODULAR_INDEX, pipeline_index
from mmdit_lora.json_files import read_object

StepEndFunction = Callable[[int, Any, Any], None]


class StepEnd(ModularPipelineBlocks):
    """At the end of a step of the denoising loop: calls `run(step, timestep, state)`, which may change `state.latents`."""

    def __init__(self, run: StepEndFunction) -> None:
        self.run = run
        super().__init__()

    def __call__(self, components: Any, state: Any, i: int, t: Any) -> tuple[Any, Any]:
        self.run(i, t, state)
        return components, state


class ModularTextToImage(DiffusionPipeline):
    """The text-to-image workflow of a modular pipeline, with the parts of most pipelines of diffusers.

    What comes before its text encoder is left out (a prompt upsampler): captions are encoded as
    they are given, as in training. The blocks take one prompt a call, so prompts are generated one after another.
    """

    modular: ClassVar[type[ModularPipeline]]
    config_name = MODULAR_INDEX
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    scheduler: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    transformer: Any
    num_timesteps: int

    def __init__(self, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any) -> None:
        super().__init__()
        parts = {"text_encoder": text_encoder, "tokenizer": tokenizer, "transformer": transformer}
        self.register_modules(scheduler=scheduler, vae=vae, **parts)
        with _without_notes():
            self.image_processor = self._blocks().init_pipeline().image_processor

    @property
    def vae_scale_factor(self) -> int:
        """Pixels that a latent cell covers, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 8

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """As diffusers' `from_pretrained`: parts that are not given are opened from where the index says.

        Raises:
            ValueError: a part cannot be opened.
        """
        base = str(pretrained_model_name_or_path)
        options = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        index = pipeline_index(base, **options)
        expected, settings = cls._get_signature_keys(cls)
        given = {name: kwargs.pop(name) for name in (*expected, *settings) if name in kwargs}
        stated = {name: index[name] for name in settings if name in index and name not in given}
        with _without_notes():
            opened: Any = ModularPipeline.from_pretrained(base, **options)
            absent = [name for name in expected if name not in given and getattr(opened, name, None) is None]
            opened.load_components(names=absent, **kwargs)
        parts = {name: getattr(opened, name, None) for name in expected if name not in given}
        if failed := sorted(name for name, part in parts.items() if part is None):
            raise ValueError(f"its {', '.join(failed)} cannot be opened")
        return cls(**parts, **stated, **given)

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True, **kwargs: Any) -> None:
        """A folder that `ModularPipeline.from_pretrained` opens. How the base is to be sampled is stated in its index."""
        folder = str(save_directory)
        self._on_parts().save_pretrained(folder, safe_serialization, overwrite_modular_index=True, **kwargs)
        if self.scheduler is not None:
            self.scheduler.save_pretrained(str(Path(folder, "scheduler")))
        _, settings = self._get_signature_keys(type(self))
        stated = {name: self.config[name] for name in sorted(settings) if self.config.get(name) is not None}
        index = Path(folder, MODULAR_INDEX)
        write_json(index, read_object(index) | stated)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        max_sequence_length: int = 8192,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Images of prompts, as the modular pipeline makes them of each.

        Args:
            latents: (B, C, h, w) noise, its 2 x 2 cells packed into channels.
            output_type: "pil", "np", "pt", or "latent": (B, C, h, w), packed as `latents`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt] * len(prompts)

        def step_end(step: int, timestep: Any, state: Any) -> None:
            self.num_timesteps = len(state.timesteps)
            if callback_on_step_end is not None:
                known = {name: getattr(state, name) for name in callback_on_step_end_tensor_inputs}
                for name, value in callback_on_step_end(self, step, timestep, known).items():
                    setattr(state, name, value)

        pipe = self._on_parts(step_end, decode=output_type != "latent", guidance_scale=guidance_scale)
        options: dict[str, Any] = {"height": height, "width": width, "sigmas": sigmas}
        options |= {} if output_type == "latent" else {"output_type": output_type}
        made = []
        for number, (text, negative) in enumerate(zip(prompts, negatives, strict=True)):
            rows = slice(number * num_images_per_prompt, (number + 1) * num_images_per_prompt)
            with self._rows(rows):
                state = pipe(
                    prompt=text,
                    negative_prompt=negative,
                    num_inference_steps=num_inference_steps,
                    num_images_per_prompt=num_images_per_prompt,
                    generator=generator[rows] if isinstance(generator, list) else generator,
                    latents=None if latents is None else latents[rows],
                    max_sequence_length=max_sequence_length,
                    **{name: value for name, value in options.items() if value is not None},
                )
            made.append(state.get("latents" if output_type == "latent" else "images"))
        self.maybe_free_model_hooks()
        images = _joined(made)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _rows(self, rows: slice) -> Any:
        """While one prompt is generated: which of all images those are."""
        del rows
        return nullcontext()

    @classmethod
    def _blocks(cls) -> Any:
        whole: Any = getattr(diffusers, str(cls.modular.default_blocks_name))()
        blocks = copy.deepcopy(whole.get_workflow("text2image"))
        for name in list(blocks.sub_blocks)[: list(blocks.sub_blocks).index("text_encoder")]:
            blocks.sub_blocks.pop(name)
        return blocks

    def _on_parts(
        self, step_end: StepEndFunction | None = None, *, decode: bool = True, guidance_scale: float | None = None
    ) -> Any:
        """The modular pipeline on the parts of this one."""
        blocks = self._blocks()
        if step_end is not None:
            loop = next(x for x in blocks.sub_blocks.values() if isinstance(x, LoopSequentialPipelineBlocks))
            loop.sub_blocks.insert("step_end", StepEnd(step_end), len(loop.sub_blocks))
        if not decode:
            blocks.sub_blocks.pop("decode")
        # The blocks go by the names of the transformer's arguments, which PEFT's wrapper does not have.
        held = ((name, getattr(self, name)) for name in self.components)
        parts = {name: x.get_base_model() if isinstance(x, PeftModel) else x for name, x in held if x is not None}
        with _without_notes():
            made = blocks.init_pipeline()
            if guidance_scale is not None:
                parts["guider"] = ClassifierFreeGuidance(guidance_scale=guidance_scale)
            if decode:
                parts["image_processor"] = self.image_processor
            made.update_components(**parts)
        made.vae = self.vae  # its scale is that of the latents, also where no block decodes
        made.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return made


@contextmanager
def _without_notes() -> Iterator[None]:
    """Without diffusers' notes on every pipeline that is built: that guiders are experimental, where a part came from."""
    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(before)


def _joined(parts: list[Any]) -> Any:
    """Images of each prompt as one list, array or tensor."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [image for part in parts for image in part]


@functools.cache
def modular_pipeline(name: str) -> type[ModularTextToImage] | None:
    """The class for a modular pipeline of diffusers, by its name; None for any other pipeline."""
    modular: Any = getattr(diffusers, name, None)
    if not (isinstance(modular, type) and issubclass(modular, ModularPipeline)):
        return None
    # Loading of LoRA, which pipelines of both kinds mix in.
    loaders = [kind for kind in modular.__bases__ if not issubclass(kind, ModularPipeline)]
    made: type[ModularTextToImage] = type(name, (ModularTextToImage, *loaders), {"modular": modular})
    return made
