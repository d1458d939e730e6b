"""What a training run on a base needs, before any weight is downloaded: parameters, memory, FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdit_lora.analysis.plan.bases import PlannedBase
from mmdit_lora.analysis.plan.trace import DeviceKind, OptimizerName, StepTrace, checkpointing, trace_step
from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError
from mmdit_lora.models import LayoutInputs
from mmdit_lora.training.loss import Batch, flow_matching_loss
from mmdit_lora.training.trainable import set_trainable

Method = Literal["lora", "layout_stream", "full"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NOT_COUNTED = (
    "text encoders and VAE",
    "what kernels allocate inside themselves, and the allocator's fragmentation",
    "a GPU's context",
)


@dataclass(frozen=True)
class Setup:
    """How one would train.

    Args:
        resolution: side of the images in pixels.
        boxes: of an image.
        batch: images of a step.
        dtype: "bf16", "fp16" or "fp32", of the frozen weights and of autocast; what trains is kept in fp32.
        text_tokens: of a caption.
        checkpoint_every: gradient checkpointing of every k-th block; 0 = none.
    """

    resolution: int
    boxes: int = 10
    batch: int = 1
    dtype: str = "bf16"
    text_tokens: int = 77
    rank: int = 16
    optimizer: OptimizerName = "adamw"
    checkpoint_every: int = 0
    device: DeviceKind = "gpu"


@dataclass(frozen=True)
class Parameters:
    """Numbers of the base, of its layout stream, and of what trains; `targets` are the linears that carry LoRA."""

    base: int
    stream: int
    trainable: int
    targets: int
    adapter_bytes: int | None


@dataclass(frozen=True)
class Forecast:
    """One method's."""

    method: Method
    parameters: Parameters
    trace: StepTrace
    batch: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; memory in bytes."""
        trace = asdict(self.trace)
        forward, backward = trace.pop("flops_forward"), trace.pop("flops_backward")
        step = forward + backward
        return {
            "parameters": asdict(self.parameters),
            "memory": trace,
            "flops": {"forward": forward, "backward": backward, "step": step, "per_image": step / self.batch},
        }


def forecast(base: PlannedBase, setup: Setup, method: Method) -> Forecast:
    """Trace one training step of `method`.

    Raises:
        InputError: the base does not take this setup, or its config makes no model.
    """
    model = planned_model(base, setup.dtype)
    latents, slots = base.latent_side(model, setup.resolution), model.layout_slots or setup.boxes
    if setup.boxes > slots:
        what, hint = f"is {setup.boxes}, and this base takes {slots}", f"give at most {slots} boxes"
        raise InputError(what, location="--boxes", hint=hint)
    numbers = set_for(model, method, setup.rank)
    model.train()
    if setup.checkpoint_every:
        model.enable_gradient_checkpointing(checkpointing(setup.device), every=setup.checkpoint_every)
    trace = trace_step(
        model,
        lambda: empty_batch(model, setup, latents, slots),
        mean_loss,
        dtype=DTYPES[setup.dtype],
        optimizer=setup.optimizer,
        device=setup.device,
    )
    return Forecast(method, numbers, trace, setup.batch)


def planned_model(base: PlannedBase, dtype: str) -> Any:
    """The transformer on the meta device, as `load_pipeline` would give it to the trainer."""
    with torch.device("meta"):
        model = base.make()
    return nn.Module.to(model, dtype=DTYPES[dtype])  # diffusers' own `to` warns of modules that these models have not


def set_for(model: Any, method: Method, rank: int) -> Parameters:
    """Set what trains, by the trainer's own function."""
    stream = sum(p.numel() for name, p in model.named_parameters() if "layout" in name)
    run = {"base": "planned", "method": method, "data": "none", "lora": {"r": rank, "alpha": 2.0 * rank}}
    report = set_trainable(model, Config.model_validate(run))
    targets, size = report.details.get("targets", ()), report.details.get("adapter_bytes")
    return Parameters(report.total_params - stream, stream, report.trainable_params, len(targets), size)


def empty_batch(model: Any, setup: Setup, latents: int, slots: int) -> Batch:
    """A batch of the right shapes, its values whatever memory holds."""
    size = setup.batch
    image = (size, model.latent_channels, latents, latents)
    phrase = (model.phrase_tokens,) if model.phrase_tokens else ()
    layout = LayoutInputs(
        boxes=torch.empty(size, slots, 4),
        phrase_embeds=torch.empty(size, slots, *phrase, model.phrase_dim),
        mask=torch.ones(size, slots, dtype=torch.bool),
    )
    return Batch(
        x0=torch.empty(image),
        noise=torch.empty(image),
        t=torch.empty(size),
        texts={
            # Some bases read their masks to find the image tokens.
            name: torch.ones(size, *shape, dtype=torch.bool) if name == "mask" else torch.empty(size, *shape)
            for name, shape in model.text_shapes(setup.text_tokens).items()
        },
        layout=layout,
    )


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """What the trainer differentiates."""
    return flow_matching_loss(model, batch).mean()


def full_fine_tuning(base: PlannedBase, setup: Setup, forecasts: Sequence[Forecast]) -> dict[str, int]:
    """The classic comparison, in bytes and without activations.

    Full fine-tuning holds weights, gradients and momentum, 3 x the weights, in fp32 as all that trains; with AdamW's two
    moments 4 x. LoRA holds the frozen weights in `setup.dtype`, and 4 x its own in fp32.

    Args:
        forecasts: any of the base; that of the method lora saves a look at the model.
    """
    lora = next((each.parameters for each in forecasts if each.method == "lora"), None)
    if lora is None:
        lora = set_for(planned_model(base, setup.dtype), "lora", setup.rank)
    weights = lora.base + lora.stream
    return {
        "weights": 4 * weights,
        "with_momentum": 3 * 4 * weights,
        "with_adamw": 4 * 4 * weights,
        "lora_with_adamw": DTYPES[setup.dtype].itemsize * weights + 4 * 4 * lora.trainable,
    }
