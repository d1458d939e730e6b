"""The process that `verify-resume` kills: `python -m mmdit_lora.training.verify_child CONFIG ROWS THREADS`.

It trains on from the newest checkpoint, and appends every step to ROWS, for whoever started it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from mmdit_lora.config import load_config
from mmdit_lora.errors import InputError, Stopped
from mmdit_lora.training.loop import StepRecord
from mmdit_lora.training.trainer import train
from mmdit_lora.training.verify_compare import row_of


def main(config: str, rows: str, threads: str) -> int:
    """Train; whatever stops it is one line on stderr."""
    torch.set_num_threads(int(threads))  # sums over other numbers of threads differ in the last bits
    with Path(rows).open("a", encoding="utf-8", buffering=1) as file:

        def note(record: StepRecord) -> None:
            file.write(json.dumps(row_of(record)) + "\n")

        try:
            train(load_config(config), resume=True, witness=note)
        except (InputError, Stopped) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
