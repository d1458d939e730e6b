"""What every family's pipeline with a layout shares: layouts in, schedules, the defaults that a base states.

The sampling loops are diffusers' own. They hand `joint_attention_kwargs` to the transformer on every step, where the
layout rides, and call back after every step, which is where the layout scale changes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
import transformers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmdit_lora.config.ranges import Range, check_arguments, check_window
from mmdit_lora.data.collate import collate_layouts
from mmdit_lora.errors import InputError, NonFiniteError, clip, counted, listed
from mmdit_lora.files import exists, output_path
from mmdit_lora.hub import HUB_OPTIONS, pipeline_index
from mmdit_lora.layout import Layout
from mmdit_lora.lora import merged_copy
from mmdit_lora.models.adapter_layers import (
    adapter_layers,
    evaluation_mode,
    scaled_adapters,
    warn_of_adapters,
    without_adapters,
)
from mmdit_lora.models.base import LayoutModelMixin
from mmdit_lora.models.layout_stream import LayoutInputs
from mmdit_lora.models.weight_files import opened_from, refuse_pickle, refuse_pickled_weights, strip_local_paths
from mmdit_lora.pipelines.styles import StyleLoader
from mmdit_lora.resources import here_or_packaged

# What `from_pretrained` of a pipeline and of its models both take.
_SHARED_OPTIONS = (*HUB_OPTIONS, "dtype", "torch_dtype", "variant", "use_safetensors")


def each_finite(images: Tensor) -> Tensor:
    """(B, ...) -> (B,) bool on the same device, which is not waited for."""
    return torch.isfinite(images).flatten(1).all(1)


def require_finite(images: Tensor, what: str) -> None:
    """Check a batch (B, ...) with one transfer from its device. NaN would be rounded to black pixels.

    Args:
        what: "images" or "latents", for the message.

    Raises:
        NonFiniteError: an element of some of them is NaN or infinite.
    """
    bad = (~each_finite(images)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(bad, len(images), what=what, dtype=str(images.dtype).removeprefix("torch."))


@functools.cache
def finite_processor(kind: Any) -> Any:
    """A class of diffusers' image processors that first checks what the VAE has decoded, see `require_finite`."""

    def postprocess(self: Any, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        require_finite(image, "images")
        return super(checked, self).postprocess(image, *args, **kwargs)

    checked: Any = type(kind.__name__, (kind,), {"postprocess": postprocess, "__module__": kind.__module__})
    return checked


def _in_evaluation_mode(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a pipeline during which no component drops out, whatever mode it or an adapter's layers are in."""

    @functools.wraps(call)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        with evaluation_mode(*(part for part in self.components.values() if isinstance(part, nn.Module))):
            return call(self, *args, **kwargs)

    return called


class LayoutPipeline(StyleLoader, DiffusionPipeline):
    """Mixed into a diffusers pipeline, in front of it: `pipe(layout=...)` generates images that follow layouts.

        pipe = load_pipeline("path/to/base", dtype=torch.bfloat16).to("cuda")
        load_adapter(pipe.transformer, "outputs/run/adapter")
        layout = Layout("two shapes", boxes=[Box((0.1, 0.1, 0.4, 0.5), "a red circle"), Box((0.5, 0.4, 0.9, 0.9), "a blue square")])
        image = pipe(layout, num_inference_steps=28, generator=torch.Generator().manual_seed(0)).images[0]

    `from_pretrained` opens a folder or hub id with a layout stream, and a plain one, whose transformer gets a fresh stream
    with zero gates (so its images are as before until the stream is trained).

    A base can state in its model_index.json how it wants to be sampled (`num_inference_steps`, `guidance_scale`,
    `max_sequence_length`); a call's own arguments win. Offloading, VAE tiling and slicing, schedulers and LoRA loading
    are diffusers' own.
    """

    transformer_class: ClassVar[type[LayoutModelMixin]]
    opens: ClassVar[tuple[str, ...]]  # the `_class_name` of the folders it opens

    transformer: Any  # a `LayoutModelMixin`
    vae: Any
    scheduler: Any
    vae_scale_factor: int
    opened_from: Path | None = None  # its folder
    stock_fingerprint: str | None = None  # of the transformer without its generic layout stream
    image_processor: Any
    config: Any
    # Encoded captions are as long as the longest of those that are encoded together.
    ragged_captions: ClassVar[bool] = False

    def __init__(self, **arguments: Any) -> None:
        """What diffusers' class takes; anything else is a default of calls, which the saved config states."""
        known = inspect.signature(super().__init__).parameters
        super().__init__(**{name: value for name, value in arguments.items() if name in known})
        self.image_processor.__class__ = finite_processor(self.image_processor.__class__)
        self.register_to_config(**{name: value for name, value in arguments.items() if name not in known})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """As diffusers' `from_pretrained`; the transformer becomes ours if it is not yet.

        Without `dtype` everything is fp32, as is diffusers' own default for its models. (transformers would take what the
        file holds, and a base saved in fp16 would open as a mixture that cannot be run.)

        Args:
            transformer_options: for the transformer's own `from_pretrained`: `layout_seed`, `layout_init`,
                `layout_attention`, `quantization_config`, ...
        """
        path = here_or_packaged(pretrained_model_name_or_path)
        refuse_pickle(kwargs.get("use_safetensors", True) is not False, path)
        kwargs["use_safetensors"] = True
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        if kwargs.get("transformer") is None:
            shared = {key: kwargs[key] for key in _SHARED_OPTIONS if key in kwargs}
            kwargs["transformer"] = cls._open_transformer(path, **shared, **(transformer_options or {}))
        elif transformer_options:
            raise ValueError("transformer_options belong to a transformer that is opened, and one is given")
        kwargs |= cls._complete_parts(path, kwargs)
        pipe = super().from_pretrained(path, **kwargs)
        _check_parts(pipe, path)
        pipe.opened_from = opened_from(path)
        return pipe

    @classmethod
    def _open_transformer(cls, path: str, **options: Any) -> Any:
        return cls.transformer_class.from_pretrained(path, subfolder="transformer", **options)

    @classmethod
    def _complete_parts(cls, path: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The models beside the transformer, with all of their weights. Where a file lacks some, transformers makes them up
        and diffusers leaves them on the meta device, both with a mere warning.

        Raises:
            InputError: weights are missing or of another shape, or they are a pickle.
        """
        options = {key: given[key] for key in _SHARED_OPTIONS if key in given}
        unusual = [key for key in ("variant", "device_map", "quantization_config") if given.get(key) is not None]
        if unusual or any(isinstance(value, dict) for value in options.values()):
            return {}  # diffusers settles these part by part
        index = pipeline_index(path, **{key: value for key, value in options.items() if key in HUB_OPTIONS})
        expected, _ = cls._get_signature_keys(cls)
        parts = {}
        for name in expected - given.keys():
            stated = index.get(name)
            library, kind = stated if isinstance(stated, list | tuple) else ("", "")
            source = {"diffusers": diffusers, "transformers": transformers}.get(str(library))
            model_class: Any = getattr(source, str(kind), None)
            if not _has_weights(model_class):
                continue
            if exists(path):
                refuse_pickled_weights(Path(path, name))
            location = f"{path}/{name}"
            try:
                model, info = model_class.from_pretrained(path, subfolder=name, output_loading_info=True, **options)
            except SafetensorError as error:
                raise InputError(f"is damaged: {error}", location=location, hint="get it anew") from None
            faults = {"missing": info["missing_keys"], "of another shape": info.get("mismatched_keys") or ()}
            if found := counted({what: sorted(map(str, keys)) for what, keys in faults.items()}):
                raise InputError(
                    f"does not hold the weights of its config: {found}", location=location, hint="download it again"
                )
            parts[name] = model
        return parts

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """A pipeline of this class (image to image, inpainting, ...) on the components of another one, weights shared.

        Args:
            kwargs: components and settings to change. With `dtype`, diffusers' own `from_pipe` casts all components in
                place; without, they keep their dtypes (there, all would become fp32).

        Raises:
            ValueError: `pipeline` has a transformer without a layout stream.
        """
        transformer = kwargs.get("transformer", getattr(pipeline, "transformer", None))
        if not isinstance(transformer, cls.transformer_class):
            raise ValueError(
                f"the transformer is a {type(transformer).__name__}, not a {cls.transformer_class.__name__}"
            )
        if kwargs.get("dtype") is not None or kwargs.get("torch_dtype") is not None:
            return super().from_pipe(pipeline, **kwargs)
        components, settings = cls._get_signature_keys(cls)
        known = {**{key: pipeline.config[key] for key in settings if key in pipeline.config}, **pipeline.components}
        return cls(**{**{key: value for key, value in known.items() if key in {*components, *settings}}, **kwargs})

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        *,
        merge_adapters: bool = False,
        **kwargs: Any,
    ) -> None:
        """As diffusers'. Adapters are left out, with one warning: what is saved is the base.

        Args:
            merge_adapters: add the active adapters into the weights that are saved; those in memory stay as they are.

        Raises:
            InputError: `safe_serialization` is False, which would write pickles; or `save_directory` is no folder; or, with
                `merge_adapters`, it is where the pipeline or its transformer was opened from; or merged weights would not be
                finite.
        """
        refuse_pickle(safe_serialization, str(save_directory))
        target = output_path(save_directory, folder=True)
        if merge_adapters:
            self._refuse_own_source(target)
        held = {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}
        plain = {name: part.get_base_model() if isinstance(part, PeftModel) else part for name, part in held.items()}
        adapted = {name: part for name, part in plain.items() if adapter_layers(part)}
        if adapted and merge_adapters:
            plain |= {name: merged_copy(part) for name, part in adapted.items()}
        elif adapted:
            warn_of_adapters(str(save_directory), *adapted.values())
        try:
            for name, part in plain.items():
                setattr(self, name, part)
            with without_adapters(*plain.values()):
                super().save_pretrained(str(save_directory), safe_serialization=True, **kwargs)
        finally:
            for name, part in held.items():
                setattr(self, name, part)
        strip_local_paths(save_directory)

    def _refuse_own_source(self, folder: Path) -> None:
        """Refuse to write merged weights over the base: the adapters would fit nothing any more."""
        part: Any = self.transformer
        part = part.get_base_model() if isinstance(part, PeftModel) else part
        sources = [place for place in (self.opened_from, getattr(part, "opened_from", None)) if place is not None]
        inner = [place / "transformer" for place in sources]
        for written in (folder, folder / "transformer"):
            for source in (*sources, *inner):
                if exists(written) and exists(source) and written.samefile(source):
                    raise InputError(
                        "is the base that the pipeline was opened from: merged weights would replace it",
                        location=str(folder),
                        hint="give another folder",
                    )

    @classmethod
    def save_lora_weights(cls, save_directory: Any, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """As diffusers'.

        Raises:
            InputError: `safe_serialization` is False, which would write a pickle; or `save_directory` is no folder.
        """
        refuse_pickle(safe_serialization, str(save_directory))
        output_path(save_directory, folder=True)
        writer: Any = super()
        writer.save_lora_weights(save_directory, *args, safe_serialization=True, **kwargs)

    # -- sizes

    @property
    def default_side(self) -> int:
        """Side in pixels of the square images that are generated where no size is given."""
        return self.default_sample_size * self.vae_scale_factor

    def check_side(self, side: int) -> None:
        """Whether this base can generate images with a side of `side` pixels.

        Raises:
            InputError: no multiple of what an image token covers, or more than there are position embeddings for.
        """
        self.transformer.check_side(side, self.vae_scale_factor)

    # -- texts and layouts

    @property
    def _execution_device(self) -> torch.device:
        """As diffusers'; that of the VAE where the transformer is there by its config alone, and only texts are encoded."""
        part = self.transformer
        by_config_alone = part is not None and part.device.type == "meta" and not hasattr(part, "_hf_hook")
        # A hook: offloaded, and will be there.
        device: torch.device = self.vae.device if by_config_alone else super()._execution_device
        return device

    @property
    def encoding_device(self) -> torch.device:
        """Where texts are encoded."""
        return self._execution_device

    def encode_phrases(self, phrases: Sequence[str], device: torch.device | None = None) -> Tensor:
        """Phrases as this base's transformer takes them: pooled embeddings (n, P), or token embeddings (n, K, P).

        Args:
            device: where they are encoded; `encoding_device` if not given, which costs a walk over every module.
        """
        raise NotImplementedError

    def encode_caption(self, caption: str | Sequence[str], device: torch.device | None = None) -> dict[str, Tensor]:
        """The texts of n images as this pipeline samples with them, by name: "embeds" (n, S, E), "pooled" (n, P) where the
        base has one, "mask" (n, S) where it masks them.

        Args:
            device: as in `encode_phrases`.
        """
        raise NotImplementedError

    def prepare_layout(self, layouts: Sequence[Layout]) -> LayoutInputs:
        """A batch of layouts on the pipeline's device, phrases encoded, padded to the base's `layout_slots` if it states them.

        Raises:
            InputError: a layout has more boxes than the base has slots.
        """
        phrases = sorted({box.phrase for layout in layouts for box in layout.boxes})
        embeds: Any = self.encode_phrases(phrases) if phrases else []
        inputs = collate_layouts(
            layouts,
            dict(zip(phrases, embeds, strict=True)),
            phrase_dim=self.transformer.phrase_dim,
            phrase_tokens=self.transformer.phrase_tokens,
            slots=self.transformer.layout_slots,
        )
        return inputs.to(self._execution_device, self.transformer.dtype)

    def layout_under_guidance(self, inputs: LayoutInputs, guidance_scale: float) -> LayoutInputs:
        """The layouts as the sampling loop's batches need them; where guidance doubles a batch, both halves."""
        del guidance_scale
        return inputs

    @contextmanager
    def _layout_during(
        self, inputs: LayoutInputs, scale: float, arguments: dict[str, Any]
    ) -> Iterator[Callable[[float], None]]:
        """Let the transformer's calls of one stock call see the layouts; what it yields changes the scale.

        Args:
            arguments: of the stock call, to be changed in place.
        """
        attention = {**(arguments["joint_attention_kwargs"] or {}), "layout": inputs, "layout_scale": scale}
        arguments["joint_attention_kwargs"] = attention

        def rescale(scale: float) -> None:
            running: Any = self
            running._joint_attention_kwargs["layout_scale"] = scale

        yield rescale

    def _stock_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call as the stock pipeline names them."""
        return arguments

    @torch.no_grad()
    @_in_evaluation_mode
    def __call__(
        self,
        layout: Layout | Mapping[str, Any] | str | Sequence[Layout | Mapping[str, Any]] | Sequence[str] | None = None,
        prompt: str | list[str] | None = None,
        *,
        layout_scale: float = 1.0,
        layout_window: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        sigmas: list[float] | None = None,
        max_sequence_length: int | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> Any:
        """Images that obey layouts. Every argument of diffusers' pipeline is taken too.

        Args:
            layout: one layout, a list (one image each), or None: text to image, with the base's own result. A dict is read
                as a layout file is; a text, or a list of texts, is a prompt without a layout, as in diffusers.
            prompt: texts instead of the layouts' captions, as many as there are layouts.
            layout_scale: factor of the layout residual; 0 = off.
            joint_attention_kwargs: as diffusers'; its "scale" multiplies the weights of all active adapters, in the transformer
                and in every text encoder, for prompts and phrases.
            layout_window: the part of the sampling steps where the layout acts, (start, end) in [0, 1]; with a `strength`
                below 1, the part of the steps that are run. CreatiLayout samples with (0, 0.3); an adapter is best
                sampled as it was trained, over all steps.

        Returns:
            diffusers' pipeline output, its images in `.images`; with `return_dict=False`, a tuple.

        Raises:
            InputError: a number is NaN, infinite or outside its range (`ranges.OF_ARGUMENT`); a layout has more boxes than the base has
                slots; the window is empty or covers no step.
            NonFiniteError: latents or decoded images hold NaN or infinity.
            ValueError: the numbers of prompts and layouts differ.
        """
        stock_call = super().__call__
        own = {
            "layout_scale": layout_scale,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "num_images_per_prompt": num_images_per_prompt,
            "sigmas": sigmas,
            "max_sequence_length": max_sequence_length,
        }
        if not isinstance(joint_attention_kwargs or {}, Mapping):
            raise InputError(
                f"is {clip(repr(joint_attention_kwargs), 60)}", location="joint_attention_kwargs", hint="give a dict"
            )
        if taken := {"layout", "layout_scale"} & set(joint_attention_kwargs or {}):
            raise InputError(
                f"holds {listed(sorted(taken))}", location="joint_attention_kwargs", hint="give it to the call itself"
            )
        check_arguments({**own, **(joint_attention_kwargs or {}), **kwargs})
        if (skip := kwargs.get("clip_skip")) is not None:
            clips = [encoder for encoder in self._text_encoders() if hasattr(encoder, "text_model")]
            layers = min((encoder.config.num_hidden_layers for encoder in clips), default=1)
            Range(0, layers - 1, whole=True).check(skip, "clip_skip")
        for side in (kwargs.get("height"), kwargs.get("width")):
            if side is not None and side < self.vae_scale_factor * self.transformer.latent_multiple:
                self.check_side(side)
        finite: list[Tensor] = []  # after each step: whose latents are
        inputs: LayoutInputs | None = None
        num_inference_steps = num_inference_steps or self.config.num_inference_steps
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        layouts, prompt = _layouts_and_prompt(layout, prompt)
        if layouts is not None:
            if not layouts:
                raise ValueError("no layout: give at least one, or None for text to image")
            # Encoded texts may stand for the captions; diffusers takes only one of the two.
            if kwargs.get("prompt_embeds") is not None:
                given = len(kwargs["prompt_embeds"])
            else:
                texts = [item.caption for item in layouts] if prompt is None else prompt
                prompt = [texts] if isinstance(texts, str) else list(texts)
                given = len(prompt)
            if given != len(layouts):
                raise ValueError(f"{given} prompts for {len(layouts)} layouts")
            for name in ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3"):
                if isinstance(kwargs.get(name), str):  # one text for all; not every stock pipeline repeats it
                    kwargs[name] = [kwargs[name]] * len(layouts)
            with scaled_adapters((joint_attention_kwargs or {}).get("scale"), *self._text_encoders()):
                inputs = self.prepare_layout(layouts).repeat_interleave(num_images_per_prompt)
            inputs = self.layout_under_guidance(inputs, guidance_scale)

            steps = len(sigmas) if sigmas is not None else num_inference_steps
            strength = inspect.signature(stock_call).parameters.get("strength")
            if strength is not None:  # image to image, inpainting: the first, noisiest steps are left out
                steps = steps_that_run(steps, kwargs.get("strength", strength.default))
            schedule = LayoutSchedule(layout_scale, layout_window, steps)
            user_callback = callback_on_step_end
            callback_on_step_end_tensor_inputs = getattr(
                user_callback, "tensor_inputs", callback_on_step_end_tensor_inputs
            )

            def callback_on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                # Schedulers of higher order call the model more often than there are steps: share out what is there.
                rescale(schedule((step + 1) * steps / pipe.num_timesteps))
                if (latents := tensors.get("latents")) is not None:
                    finite.append(each_finite(latents))  # read only where an image turns out not to be: no waiting here
                return tensors if user_callback is None else user_callback(pipe, step, timestep, tensors)

        arguments = {
            "prompt": prompt,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "num_images_per_prompt": num_images_per_prompt,
            "sigmas": sigmas,
            "max_sequence_length": max_sequence_length or self.config.max_sequence_length,
            "joint_attention_kwargs": joint_attention_kwargs,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": list(callback_on_step_end_tensor_inputs),
            **kwargs,
        }
        try:
            with ExitStack() as stack:
                if inputs is not None:
                    rescale = stack.enter_context(self._layout_during(inputs, schedule(0), arguments))
                output = stock_call(**self._stock_arguments(arguments))
            if isinstance(output[0], Tensor) and output[0].is_floating_point():  # latents; images were looked at before
                require_finite(output[0], "latents")
        except NonFiniteError as error:
            step = next((number for number, each in enumerate(finite, start=1) if not each.all()), None)
            raise error.change(step=step) from None
        return output


def _has_weights(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, (ModelMixin, PreTrainedModel))


def _check_parts(pipe: Any, location: str) -> None:
    """Whether tokenizers, text encoders, VAE and transformer belong together.

    Raises:
        InputError: a tokenizer has ids, an end token or a length that its text encoder has not; or the VAE has other latents.
    """
    hint = "take all parts from one base"
    for name, tokenizer in pipe.components.items():
        encoder = (
            pipe.components.get(name.replace("tokenizer", "text_encoder")) if name.startswith("tokenizer") else None
        )
        if tokenizer is None or encoder is None:
            continue
        part, tokenizer = f"{location}/{name}", getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        largest, rows = max(tokenizer.get_vocab().values(), default=0), encoder.get_input_embeddings().num_embeddings
        if largest >= rows:
            raise InputError(
                f"has ids up to {largest:,}, and its text encoder knows {rows:,}", location=part, hint=hint
            )
        end = getattr(encoder.config, "eos_token_id", None)
        # 2 stands in CLIP's older configs, whatever the vocabulary is.
        if isinstance(end, int) and end != 2 and tokenizer.eos_token_id not in (None, end):
            raise InputError(
                f"ends texts with {tokenizer.eos_token_id}, and its text encoder looks for {end}",
                location=part,
                hint=hint,
            )
        places = getattr(encoder.config, "max_position_embeddings", None)
        if isinstance(places, int) and places < tokenizer.model_max_length < 10**6:
            raise InputError(
                f"makes {tokenizer.model_max_length} tokens of a text, and its text encoder has {places} places",
                location=part,
                hint=hint,
            )
    channels = getattr(getattr(pipe.vae, "config", None), "latent_channels", None)
    if channels is not None and channels != pipe.transformer.latent_channels:
        raise InputError(
            f"has {channels} latent channels, and the transformer {pipe.transformer.latent_channels}",
            location=f"{location}/vae",
            hint=hint,
        )


def _layouts_and_prompt(
    layout: Any, prompt: str | list[str] | None
) -> tuple[list[Layout] | None, str | list[str] | None]:
    """What the first two arguments of a call stand for.

    Raises:
        InputError: something is neither a layout, nor a dict of one, nor a text; texts and layouts are mixed; or the
            prompt is given twice.
    """
    if layout is None:
        return None, prompt
    items = layout if isinstance(layout, Sequence) and not isinstance(layout, str) else [layout]
    for item in items:
        if not isinstance(item, Layout | Mapping | str):
            raise InputError(
                f"is a {type(item).__name__}",
                location="layout",
                hint="give a Layout, a dict of one, a text, or a list of these",
            )
    if texts := [item for item in items if isinstance(item, str)]:
        if len(texts) < len(items):
            raise InputError("holds texts and layouts", location="layout", hint="give layouts only, or texts only")
        if prompt is not None:
            raise InputError("are both texts", location="layout and prompt", hint="give the prompt once")
        return None, layout if isinstance(layout, str) else texts
    layouts = []
    for number, item in enumerate(items):
        try:
            layouts.append(Layout.from_dict(dict(item)) if isinstance(item, Mapping) else item)
        except InputError as error:
            raise error.at("layout" if item is layout else f"layout {number}") from None
    return layouts, prompt


def steps_that_run(steps: int, strength: float) -> int:
    """How many of `steps` diffusers runs when it starts from an image, noised to `strength` in [0, 1].

    As `get_timesteps` of its image-to-image pipelines (diffusers 0.42.1).
    """
    return steps - int(max(steps - min(steps * strength, steps), 0))


class LayoutSchedule:
    """Layout scale as a function of the sampling step: `scale` inside the window, 0 outside, where the stream is skipped.

    Raises:
        InputError: the window is not 0 <= start < end <= 1, or rounds to no step at all (`int(0.3 * 3)` is 0).
    """

    def __init__(self, scale: float, window: tuple[float, float], steps: int) -> None:
        check_window(window)
        start, end = window
        self.scale = scale
        self.first, self.last = int(start * steps), int(end * steps)
        if self.first == self.last:
            raise InputError(
                f"{window} covers none of {steps} steps",
                location="layout_window",
                hint="take more steps or a wider window",
            )

    def __call__(self, step: float) -> float:
        """Scale at `step` (0 = the first, the noisiest)."""
        return self.scale if self.first <= step < self.last else 0.0
