"""Small faults put into the package one at a time, to see that the default suite catches each.

    uv run python scripts/mutations.py                      all of them, about a quarter of an hour on two cores
    uv run python scripts/mutations.py --only prior dropout  those whose name holds one of these words
    uv run python scripts/mutations.py --json FILE          write, for each, the test that caught it

Each fault is one edit of one line (a sign, a mask, a scale, a missing line) in a copy of the tree; then the named test files run
in that copy until one fails. Exit code 1 if a fault is survived, 2 if a line to be edited is no longer there once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Args:
        name: what goes wrong. file: below `mmdit_lora`. old, new: the text, which stands there once, and what replaces it.
        tests: files below `tests` that should notice, without `test_` and `.py`.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _m(name: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(name, file, old, new, tests)


STREAM, BASE, SD3, FLUX = "models/layout_stream.py", "models/base.py", "models/sd3.py", "models/flux.py"
STEP, LOSS, FLOW = "training/step.py", "training/loss.py", "flow.py"
MUTATIONS = (
    # the model
    _m(
        "key mask: image and layout changed over",
        STREAM,
        "torch.cat([image_keys, key_mask], dim=1)",
        "torch.cat([key_mask, image_keys], dim=1)",
        "models",
        "families",
    ),
    _m(
        "null features for real boxes",
        STREAM,
        "real = layout.mask[..., None, None]",
        "real = ~layout.mask[..., None, None]",
        "models",
        "families",
    ),
    _m(
        "box features in the model's dtype",
        STREAM,
        "torch.promote_types(dtype, torch.float32)",
        "dtype",
        "models",
        "families",
    ),
    _m(
        "sign of the layout tokens' residual",
        STREAM,
        "layout_states + gate_msa.unsqueeze(1) * layout_out",
        "layout_states - gate_msa.unsqueeze(1) * layout_out",
        "creatilayout_parity",
    ),
    _m(
        "the layout MLP is left out",
        STREAM,
        "layout_states = layout_states + gate_mlp.unsqueeze(1) * self.layout_mlp(norm_layout)",
        "layout_states = layout_states + 0 * self.layout_mlp(norm_layout)",
        "lora",
        "creatilayout_parity",
    ),
    _m(
        "single blocks: no time gate",
        STREAM,
        "out = gate.unsqueeze(1) * (out + self.in_chunks(self.layout_mlp, norm_states))",
        "out = out + self.in_chunks(self.layout_mlp, norm_states)",
        "creatilayout_parity",
    ),
    _m(
        "a gate that is not zero",
        STREAM,
        "nn.init.zeros_(linear.weight)",
        "nn.init.normal_(linear.weight)",
        "models",
        "families",
    ),
    _m(
        "cross: layout tokens see padding",
        "models/attention.py",
        "self.to_add_out(self.processor.attend(query, key, value, mask))",
        "self.to_add_out(self.processor.attend(query, key, value, None))",
        "families",
    ),
    _m(
        "guidance: the first half of the layouts",
        BASE,
        "return layout[batch:]",
        "return layout[:batch]",
        "models",
        "pipeline",
    ),
    _m(
        "padding is attended to",
        BASE,
        "(layout.mask | ~has_layout)",
        "(layout.mask | has_layout)",
        "models",
        "families",
    ),
    _m(
        "no box is not the base model",
        BASE,
        "scale * has_layout.unsqueeze(-1).to(tokens.dtype)",
        "scale * torch.ones_like(has_layout.unsqueeze(-1).to(tokens.dtype))",
        "models",
        "families",
    ),
    _m(
        "SD3: the layout scale has no effect",
        SD3,
        "gate_msa.unsqueeze(1) * attn_out + layout_gain * residual",
        "gate_msa.unsqueeze(1) * attn_out + residual",
        "models",
        "families",
    ),
    _m(
        "SD3: sign of the layout residual",
        SD3,
        "gate_msa.unsqueeze(1) * attn_out + layout_gain * residual",
        "gate_msa.unsqueeze(1) * attn_out - layout_gain * residual",
        "creatilayout_parity",
    ),
    _m(
        "SD3: timesteps in [0, 1]",
        SD3,
        '"timestep": 1000 * t',
        '"timestep": t',
        "training_choices",
        "models",
        "trainer",
        "families",
    ),
    _m(
        "FLUX: the layout in the unconditional call",
        FLUX,
        "layout = layout.dropped()",
        "layout = layout",
        "families",
    ),
    _m(
        "FLUX: rotary position of layout tokens",
        FLUX,
        "LAYOUT_POSITION = -1.0",
        "LAYOUT_POSITION = 0.0",
        "creatilayout_parity",
    ),
    _m(
        "FLUX: latents unpacked with sides changed over",
        "models/latents.py",
        "permute(0, 3, 1, 4, 2, 5)",
        "permute(0, 3, 2, 4, 1, 5)",
        "families",
        "flux_pipeline",
    ),
    # the objective
    _m(
        "x_t: noise and image changed over",
        FLOW,
        "return (1 - t) * x0 + t * noise",
        "return t * x0 + (1 - t) * noise",
        "flow",
    ),
    _m("sign of the velocity", FLOW, "return noise - x0", "return x0 - noise", "flow"),
    _m(
        "shift the wrong way",
        FLOW,
        "return shift * t / (1 + (shift - 1) * t)",
        "return t / (shift - (shift - 1) * t)",
        "flow",
    ),
    _m(
        "weights inside boxes without their mean of 1",
        FLOW,
        "return (weights / weights.mean(dim=(1, 2), keepdim=True)).unsqueeze(1)",
        "return weights.unsqueeze(1)",
        "flow",
    ),
    _m(
        "min-SNR: the larger of the two",
        FLOW,
        "return torch.minimum((1 - t) ** 2, gamma * t**2)",
        "return torch.maximum((1 - t) ** 2, gamma * t**2)",
        "flow",
        "training_choices",
    ),
    _m(
        "the weight inside boxes is not applied",
        LOSS,
        "weight = inside_weight(batch.layout.boxes, batch.layout.mask, height, width, objective.inside)",
        "pass",
        "every_key",
        "training_choices",
        "trainer",
    ),
    _m(
        "the weight by time is not applied",
        LOSS,
        "each = each * time_weight(batch.t, objective.weighting, gamma=objective.min_snr_gamma)",
        "pass",
        "every_key",
        "training_choices",
    ),
    _m(
        "prior preservation: its weight",
        STEP,
        "run.config.prior.weight * moved / settings.gradient_accumulation",
        "moved / settings.gradient_accumulation",
        "every_key",
        "prior",
    ),
    # data
    _m(
        "boxes are not mirrored with the image",
        "data/transforms.py",
        "boxes = F.horizontal_flip(boxes)",
        "pass",
        "transforms",
        "data_properties",
    ),
    _m(
        "boxes are not cropped from the corner",
        "data/transforms.py",
        "F.crop(boxes, *to.corner, *to.size)",
        "F.crop(boxes, 0, 0, *to.size)",
        "transforms",
        "data_properties",
    ),
    _m(
        "min_visible has no effect",
        "data/transforms.py",
        "_areas(boxes) >= min_visible * areas",
        "_areas(boxes) >= 0 * areas",
        "transforms",
        "augment",
    ),
    _m(
        "every epoch in one order",
        "data/sampler.py",
        'seeded("order", seed, epoch)',
        'seeded("order", seed)',
        "order",
        "trainer",
    ),
    _m(
        "a bucket's rest is dropped",
        "data/sampler.py",
        "for row in range(epoch * size // self.batch, (epoch + 1) * size // self.batch)",
        "for row in range(-(-epoch * size // self.batch), (epoch + 1) * size // self.batch)",
        "buckets",
    ),
    _m(
        "ratio of buckets without its sign",
        "data/buckets.py",
        "return abs(math.log(size[1] / size[0]) - math.log(image[1] / image[0]))",
        "return math.log(size[1] / size[0]) - math.log(image[1] / image[0])",
        "buckets",
    ),
    _m(
        "layout dropout has no effect",
        "training/encoding.py",
        "layout.mask & ~samples.drops_layout[:, None].cpu()",
        "layout.mask",
        "every_key",
        "trainer",
    ),
    _m(
        "phrase dropout has no effect",
        "data/collate.py",
        '"" if silent else box.phrase for box, silent in zip',
        "box.phrase for box, silent in zip",
        "augment",
        "every_key",
    ),
    # training and resume
    _m("the adapter's dropout does not rescale", "lora/dropout.py", "/ (1 - self.p)", "", "dropout"),
    _m(
        "the learning rate stands still",
        STEP,
        "run.schedule.step()",
        "pass",
        "every_key",
        "training_choices",
        "trainer",
    ),
    _m(
        "accumulated gradients are not averaged",
        STEP,
        "accelerator.backward(losses.mean() / settings.gradient_accumulation)",
        "accelerator.backward(losses.mean())",
        "trainer",
        "every_key",
    ),
    _m("gradients are never zeroed", STEP, "run.optimizer.zero_grad()", "pass", "trainer", "every_key"),
    _m("the moving average is not updated", STEP, "run.ema.update()", "pass", "training_choices", "every_key"),
    _m(
        "resume: the optimizer starts anew",
        "training/checkpoint.py",
        "load_optimizer(optimizer, self.folder / OPTIMIZER)",
        "pass",
        "trainer",
        "training_choices",
    ),
    _m(
        "resume: the moving average's count is lost",
        "training/ema.py",
        'self._ema.optimization_step = int(tensors.pop("updates"))',
        'tensors.pop("updates")',
        "training_choices",
        "trainer",
    ),
    _m(
        "resume: a changed checkpoint is not noticed",
        "training/checkpoint.py",
        "or _sha256(self.folder / name) != digest",
        "",
        "trainer",
        "kill",
        "malformed_data",
    ),
    _m(
        "the best checkpoint is pruned",
        "training/checkpoint.py",
        "if old.step != best and not old.others():",
        "if True:",
        "training_choices",
        "trainer",
    ),
    _m(
        "LoRA+ without its ratio",
        "training/optim.py",
        "loraplus_lr_ratio=train.lora_plus",
        "loraplus_lr_ratio=1.0",
        "training_choices",
        "every_key",
    ),
    # adapters and export
    _m("LoRA in the base's dtype", "lora/inject.py", "cast_training_params(model, torch.float32)", "pass", "lora"),
    _m(
        "the fingerprint depends on the dtype",
        "models/fingerprint.py",
        "value = value.to(torch.bfloat16) if value.is_floating_point() else value",
        "value = value.float() if value.is_floating_point() else value",
        "adapter_files",
        "quantization",
        "lora",
    ),
    _m(
        "merged by the bare product",
        "lora/inject.py",
        "layer.merge(safe_merge=True)",
        "layer.scale_layer(0.5) or layer.merge(safe_merge=True)",
        "lora",
        "export",
    ),
    _m(
        "an export that differs counts",
        "export/export.py",
        "if not velocity <= TOLERANCE or not (image is None or image <= IMAGE_TOLERANCE):",
        "if False:",
        "export",
        "cli_model",
    ),
    _m(
        "dropout stays on while sampling",
        "models/adapter_layers.py",
        "module.training = False",
        "pass",
        "pipeline_with_adapter",
    ),
)


def run(mutation: Mutation, tree: Path) -> str | None:
    """The test that failed with the fault in place; None if none did."""
    file = tree / "mmdit_lora" / mutation.file
    right = file.read_text(encoding="utf-8")
    file.write_text(right.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        files = [f for name in mutation.tests if (tree / (f := f"tests/test_{name}.py")).is_file()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
        environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, env=environment)
    finally:
        file.write_text(right, encoding="utf-8")
    if done.returncode not in (0, 1, 2):
        raise SystemExit(f"{mutation.name}: pytest ended with {done.returncode}\n{done.stdout}{done.stderr}")
    caught = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return caught[1] if done.returncode and caught else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.only or any(word in m.name for word in options.only)]
    gone = [m for m in chosen if (ROOT / "mmdit_lora" / m.file).read_text(encoding="utf-8").count(m.old) != 1]
    for mutation in gone:
        print(f"mmdit_lora/{mutation.file} does not hold this once: {mutation.old}", file=sys.stderr)
    if gone:
        return 2
    caught: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        skipped = shutil.ignore_patterns(".git", ".venv", ".work", "__pycache__", "outputs", "wandb", "*_cache")
        shutil.copytree(ROOT, tree, ignore=skipped)
        for mutation in chosen:
            caught[mutation.name] = run(mutation, tree)
            print(f"{mutation.name:<52} {caught[mutation.name] or 'SURVIVED'}", flush=True)
    if options.json is not None:
        found = [{"fault": m.name, "file": f"mmdit_lora/{m.file}", "caught_by": caught[m.name]} for m in chosen]
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    survived = sum(test is None for test in caught.values())
    print(f"{len(caught)} faults, {survived} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
