"""`train` under FSDP2 or ZeRO on a CPU: `torchrun --nproc_per_node 2 -m tests.spread_child fsdp2|zero2|zero3 CONFIG [--resume]`.

Accelerate takes several CPU processes for DDP. Here it is told that they are FSDP's or DeepSpeed's after it has started; what
prepares, shards, clips, steps and saves is its own path, and ours.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from mmdit_lora.config.loading import load_config
from mmdit_lora.training import setup as run_module
from mmdit_lora.training.trainer import train


class Sharded(Accelerator):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        self.state.fsdp_plugin = plugin
        _is(self, DistributedType.FSDP)


class Zero(Accelerator):
    stage = 2

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        from deepspeed import comm

        comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        plugin = DeepSpeedPlugin(zero_stage=self.stage)
        plugin.set_mixed_precision(options["mixed_precision"])
        plugin.select(_from_accelerator_state=True)
        self.state.deepspeed_plugins = {"default": plugin}
        self.deepspeed_engine_wrapped = None
        _is(self, DistributedType.DEEPSPEED)


def _is(accelerator: Accelerator, kind: DistributedType) -> None:
    accelerator.state.__dict__["distributed_type"] = kind
    PartialState._shared_state["distributed_type"] = kind


if __name__ == "__main__":
    Zero.stage = 3 if sys.argv[1] == "zero3" else 2
    run_module.Accelerator = Sharded if sys.argv[1] == "fsdp2" else Zero  # type: ignore[misc]
    train(load_config(sys.argv[2]), resume="--resume" in sys.argv)
