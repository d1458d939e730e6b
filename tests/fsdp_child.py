"""`train` under FSDP2 on a CPU: `torchrun --nproc_per_node 2 -m tests.fsdp_child CONFIG [--resume]`.

Accelerate takes several CPU processes for DDP. Here it is told that they are FSDP's after it has started; what prepares,
shards, clips and saves is its own FSDP2 path, and ours.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from mmdit_lora.config import load_config
from mmdit_lora.training import run as run_module
from mmdit_lora.training.trainer import train


class Sharded(Accelerator):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        self.state.fsdp_plugin = plugin
        self.state.__dict__["distributed_type"] = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    run_module.Accelerator = Sharded  # type: ignore[misc]
    train(load_config(sys.argv[1]), resume="--resume" in sys.argv)
