"""The stock pipelines of every described family, with a layout: one class is made of each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor

from mmdit_lora.errors import InputError, clip
from mmdit_lora.hub import pipeline_index
from mmdit_lora.lora import load_adapter
from mmdit_lora.models.base import log_new_stream, open_strictly
from mmdit_lora.models.generic_stream import StreamModel, add_layout_stream
from mmdit_lora.models.layout_stream import LayoutInputs
from mmdit_lora.models.stream_families import STREAM_FAMILIES
from mmdit_lora.models.stream_families.base import StreamFamily
from mmdit_lora.models.stream_files import load_layout_stream, read_stream_config
from mmdit_lora.models.weight_files import opened_from
from mmdit_lora.pipelines.base import LayoutPipeline
from mmdit_lora.pipelines.modular import modular_pipeline
from mmdit_lora.pipelines.styles import StyleLoader, layout_adapter_file


class GenericLayoutPipeline(LayoutPipeline):
    """Mixed into a stock diffusers pipeline, in front of it: see `LayoutPipeline`, and `generic_pipeline`.

    The loop is the stock one. Its calls of the transformer see the layout while the pipeline runs, and those without text do
    not; guidance is what the stock pipeline does. `save_pretrained` writes a folder that stock diffusers opens.
    """

    stream_family: ClassVar[StreamFamily]

    @classmethod
    def _open_transformer(
        cls,
        path: str,
        *,
        stream: str | None = None,
        layout_attention: str = "siamese",
        layout_width: int | None = None,
        layout_seed: int = 0,
        **options: Any,
    ) -> Any:
        """The stock transformer with the stream of a folder, or with a new one.

        Raises:
            InputError: it is damaged; the stream does not fit it; or a new one cannot be built so.
        """
        stock = getattr(diffusers, cls.stream_family.transformer)
        model, _ = open_strictly(stock.from_pretrained, stock, path, subfolder="transformer", **options)
        if stream is not None:
            load_layout_stream(model, stream)
        else:
            try:
                add_layout_stream(model, attention=layout_attention, width=layout_width, seed=layout_seed)
            except ValueError as error:
                raise InputError(str(error), location="stream", hint="see the section `stream` of the config") from None
            log_new_stream(path, model, f"seed {layout_seed}")
        model.opened_from = opened_from(path, "transformer")
        return model

    @torch.no_grad()
    def encode_phrases(self, phrases: Sequence[str], device: torch.device | None = None) -> Tensor:
        """One embedding for each phrase, (n, E), as the family makes it of its text encoder's states."""
        return self.stream_family.phrases(self, list(phrases)).to(device or self._execution_device)

    @torch.no_grad()
    def encode_caption(self, caption: str | Sequence[str], device: torch.device | None = None) -> dict[str, Tensor]:
        texts = [caption] if isinstance(caption, str) else list(caption)
        encoded = self.stream_family.captions(self, texts, self.config.max_sequence_length)
        return {name: value.to(device or self._execution_device) for name, value in encoded.items()}

    @contextmanager
    def _layout_during(
        self, inputs: LayoutInputs, scale: float, arguments: dict[str, Any]
    ) -> Iterator[Callable[[float], None]]:
        guides = (arguments["guidance_scale"] or 0) > 1
        alternates = self.stream_family.guidance == "alternate" and guides
        with ExitStack() as stack:
            if not self._calls_back():
                stack.enter_context(self._after_steps(arguments.pop("callback_on_step_end")))
            yield stack.enter_context(self.transformer.with_layout(inputs, scale, alternates=alternates))

    def _calls_back(self) -> bool:
        """Whether the stock pipeline takes `callback_on_step_end`."""
        return "callback_on_step_end" in inspect.signature(super(LayoutPipeline, self).__call__).parameters

    @contextmanager
    def _after_steps(self, callback: Callable[..., Any]) -> Iterator[None]:
        """Call back after each step of the scheduler; what is given back is not taken."""
        step, done = self.scheduler.step, 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            out = step(*args, **kwargs)
            callback(self, done, args[1] if len(args) > 1 else kwargs.get("timestep"), {"latents": out[0]})
            done += 1
            return out

        self.scheduler.step = counted
        try:
            yield
        finally:
            del self.scheduler.step

    def _rows(self, rows: slice) -> Any:
        return self.transformer.rows_of_layout(rows)

    def _stock_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        known = inspect.signature(super(LayoutPipeline, self).__call__).parameters
        prompt = arguments["prompt"]
        count = 1 if isinstance(prompt, str) else len(prompt or ())
        guidance = self.stream_family.guide(arguments.pop("guidance_scale"), count)
        if "max_sequence_length" not in known:  # Qwen-Image 2.1 reads whole captions
            arguments.pop("max_sequence_length")
        attention = arguments.pop("joint_attention_kwargs")
        name = next((name for name in ("joint_attention_kwargs", "attention_kwargs") if name in known), None)
        if name is not None:
            arguments.setdefault(name, attention)
        if not self._calls_back() and arguments.get("callback_on_step_end") is None:
            arguments = {key: value for key, value in arguments.items() if not key.startswith("callback_on_step_end")}
        if layers := self.config.get("text_encoder_out_layers"):
            arguments.setdefault("text_encoder_out_layers", tuple(layers))
        return {key: value for key, value in {**guidance, **arguments}.items() if key in known or value is not None}

    def load_lora_weights(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """A layout adapter in any form that `export` writes, as `load_adapter` does; any other LoRA as diffusers does."""
        source = pretrained_model_name_or_path_or_dict
        if (file := layout_adapter_file(source, kwargs)) is None:
            stock: Any = super(StyleLoader, self)
            if not hasattr(stock, "load_lora_weights"):
                what = f"is no layout adapter, and diffusers' {type(self).__name__} loads no other LoRA"
                raise InputError(what, location=clip(repr(source), 100))
            return stock.load_lora_weights(source, *args, **kwargs)
        return load_adapter(self.transformer, file, adapter_name=kwargs.get("adapter_name") or "default")


def generic_on_meta(
    base: str,
    *,
    stream: str | None = None,
    layout_attention: str = "siamese",
    layout_width: int | None = None,
    **_: Any,
) -> Any:
    """The transformer of a base with its stream, both by their configs alone, on the meta device."""
    index = pipeline_index(base)
    pipeline = generic_pipeline(index["_class_name"])
    if pipeline is None:
        raise InputError(f"is a {index['_class_name']}, which no family describes", location=base)
    stock = getattr(diffusers, pipeline.stream_family.transformer)
    if stream is not None:
        stored = read_stream_config(stream)
        layout_attention, layout_width = stored["attention"], stored["width"]
    with torch.device("meta"):
        model = stock.from_config(stock.load_config(base, subfolder="transformer"))
        add_layout_stream(model, attention=layout_attention, width=layout_width)
    return model


@functools.cache
def generic_pipeline(name: str) -> type[GenericLayoutPipeline] | None:
    """The class for a stock diffusers pipeline, by its name; None where no family describes it."""
    family = next((family for family in STREAM_FAMILIES.values() if name in family.pipelines), None)
    stock: Any = None if family is None else modular_pipeline(name) or getattr(diffusers, name)
    if family is None:
        return None
    own: dict[str, Any] = {"max_sequence_length": family.max_length, "num_inference_steps": 28, "guidance_scale": 4.0}
    own |= {"default_sample_size": None, "text_encoder_out_layers": None}
    stated = inspect.signature(stock.__init__)
    keyword = inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter(key, keyword, default=value) for key, value in own.items() if key not in stated.parameters
    ]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments.pop("self")
        super(made, self).__init__(**arguments)
        # Stated by the base, by the stock class, or 1024 pixels where a cell is 8.
        self.default_sample_size = arguments["default_sample_size"] or vars(self).get("default_sample_size", 128)

    signature = stated.replace(parameters=[*stated.parameters.values(), *more])
    vars(__init__)["__signature__"] = signature  # diffusers reads the components from it
    body = {"__init__": __init__, "__module__": stock.__module__, "__doc__": stock.__doc__, "stream_family": family}
    body |= {"transformer_class": StreamModel, "opens": (name,), "ragged_captions": family.ragged}
    # Not every stock pipeline loads LoRA itself.
    body["_lora_loadable_modules"] = getattr(stock, "_lora_loadable_modules", ["transformer"])
    # A base may come without its further text encoders, as SD3 without T5, or what rewrites prompts, and a saved one then says null. What has a default
    # is a setting: Krea 2's `text_encoder_select_layers`.
    parts = [key for key, parameter in stated.parameters.items() if parameter.default is parameter.empty]
    further = [key for key in parts if key.startswith(("text_encoder_", "tokenizer_", "text_processor"))]
    body["_optional_components"] = [*getattr(stock, "_optional_components", ()), *further]
    # Under the stock name: a saved folder is one that stock diffusers opens.
    made: type[GenericLayoutPipeline] = type(name, (GenericLayoutPipeline, stock), body)
    return made
