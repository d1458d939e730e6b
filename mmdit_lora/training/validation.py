"""Validation during a run: held-out loss, what the layout is worth, sample images and their fidelity."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mmdit_lora.errors import NonFiniteError
from mmdit_lora.evaluation.detectors.shapes import measure, readable
from mmdit_lora.pipelines import generate
from mmdit_lora.pipelines.sampling import quiet_texts
from mmdit_lora.training.held_out import HeldOutLosses, PairedLoss, compare_losses, held_out_losses, layout_matters
from mmdit_lora.training.run_dir import SAMPLES
from mmdit_lora.training.setup import Run
from mmdit_lora.training.sharding import full_tensor, reshard
from mmdit_lora.training.tracking import Tracker
from mmdit_lora.visual import contact_sheet, draw_boxes, phrase_colors, save_png

logger = logging.getLogger(__name__)

_BLOCK = re.compile(r"^((?:\w+_)?transformer_blocks)\.(\d+)\.")


@contextmanager
def ema_weights(run: Run) -> Iterator[None]:
    """The weights that would be saved: the moving average where there is one. Modules are in evaluation mode."""
    transformer = run.pipe.transformer
    transformer.eval()
    try:
        if run.ema is None:
            yield
        else:
            with run.ema.applied():
                yield
    finally:
        reshard(transformer)
        transformer.train()


def compare(run: Run) -> tuple[HeldOutLosses, PairedLoss] | None:
    """Losses of the held-out images, and against the base's; None where no image is held out. The result is `run.compared`."""
    if run.held_out is None or run.base_losses is None:
        return None
    with ema_weights(run):
        # Not through DDP's wrapper: only the main process comes here, and the wrapper would wait for the others.
        losses = held_out_losses(run.pipe.transformer, run.held_out, run.accelerator.device)
    run.compared = run.state.step, compare_losses(run.base_losses, losses.per_image)
    return losses, run.compared[1]


def validate(run: Run, tracker: Tracker) -> tuple[dict[str, float], float | None]:
    """What is due at this step: held-out losses, sampled images. On the main process.

    Returns:
        Metrics, and a score, higher is better: the images' mIoU where it was measured, else minus the held-out loss; None
        where neither was.
    """
    settings, step = run.config.train, run.state.step
    metrics: dict[str, float] = {}
    score = None
    due = _due(step, settings.validate_every, last=step == settings.max_steps)
    if run.held_out is not None and due and (compared := compare(run)) is not None:
        losses, paired = compared
        metrics |= {"held_out/loss": paired.trained, "held_out/loss_minus_base": paired.difference}
        metrics |= {f"held_out/loss_t{n}": value for n, value in enumerate(losses.by_time())}
        with ema_weights(run):
            metrics |= layout_matters(run.pipe.transformer, run.held_out, run.accelerator.device)
        score = -paired.trained
    if _due(step, settings.sample_every, last=False):
        with ema_weights(run):
            fidelity = _sample(run, tracker)
        metrics |= fidelity
        score = fidelity.get("fidelity/miou", score)
    return metrics, score


def is_due(run: Run) -> bool:
    """Whether something is shown at this step."""
    settings, step = run.config.train, run.state.step
    return _due(step, settings.validate_every, step == settings.max_steps) or _due(step, settings.sample_every, False)


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norm of the gradients of each block's trainable parameters, and of those in none."""
    squares: defaultdict[str, float] = defaultdict(float)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found = _BLOCK.match(name)
            place = f"{found[1]}.{int(found[2]):02d}" if found else name.split(".")[0]
            squares[place] += full_tensor(parameter.grad).float().square().sum().item()
    return {f"grad_norm/{place}": value**0.5 for place, value in squares.items()}


def _due(step: int, every: int, last: bool) -> bool:
    return bool(every) and (step % every == 0 or last)


def _sample(run: Run, tracker: Tracker) -> dict[str, float]:
    """Sample the first held-out layouts at their images' size, always from the same noise.

    Returns:
        Their fidelity, where their phrases are those of procedural scenes. Images that hold NaN or infinity are not written; a warning says so.
    """
    source = run.held_out or run.examples
    layouts = [source.records[n].layout for n in range(min(run.config.train.sample_count, len(source.records)))]
    if not layouts:
        return {}
    # The prepared model answers in fp32, which the VAE would not take.
    with run.accelerator.autocast(), torch.no_grad(), quiet_texts(run.pipe):
        sizes = [source.size_of(index) for index in range(len(layouts))]
        try:
            images = generate(run.pipe, layouts, run.settings, sizes=sizes, seed=run.config.sample.seed)
        except NonFiniteError as error:  # of what was trained so far: no reason to end the run
            logger.warning("no samples of step %d: %s", run.state.step, error)
            return {}
    colors = phrase_colors(layouts)
    boxed = [draw_boxes(image, layout, colors=colors) for image, layout in zip(images, layouts, strict=True)]
    if run.accelerator.is_main_process:
        save_png(contact_sheet(boxed), run.folder / SAMPLES / f"step_{run.state.step:07d}.png")
    tracker.log_images(run.state.step, "samples", images, layouts)
    if not readable(layouts):
        return {}
    found = measure(images, layouts).to_dict()
    fidelity = {name: float(value) for name, value in found.items() if name != "boxes"}
    run.fidelity = {"step": run.state.step, "images": len(images), "values": fidelity}
    return {f"fidelity/{name}": value for name, value in fidelity.items()}
