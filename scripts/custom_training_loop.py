"""A training loop of your own: Accelerate, PyTorch's DataLoader, and public names of mmdit_lora.

uv run python scripts/custom_training_loop.py --steps 200 --out outputs/custom
uv run mmdit-lora sample --base data/tiny_base --adapter outputs/custom --layout LAYOUT.json --out outputs/samples
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import mmdit_lora as ml

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="data/tiny_base")
    parser.add_argument("--data", default="shapes://mixed?count=500&seed=1", help="a folder, shards, or scenes")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="outputs/custom")
    arguments = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)
    pipe = ml.load_pipeline(arguments.base).to(accelerator.device)
    ml.add_layout_lora(pipe.transformer)  # or with your own peft.LoraConfig
    trainable = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    dataset = ml.LayoutDataset(arguments.data, size=pipe.default_side, seed=0, samples=8 * arguments.steps)
    loader = DataLoader(dataset, batch_size=8, collate_fn=ml.LayoutCollator(), num_workers=2)
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    transformer, optimizer, loader = accelerator.prepare(pipe.transformer.train(), optimizer, loader)
    encode = ml.LayoutEncoder(pipe)  # latents, captions and phrases; each text once
    for step, samples in enumerate(loader, start=1):
        batch = encode(samples).to(accelerator.device)
        loss = ml.flow_matching_loss(transformer, batch).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}: loss {loss.item():.4f}")
    if accelerator.is_main_process:
        ml.save_adapter(accelerator.unwrap_model(transformer), arguments.out, metadata={"base": arguments.base})
