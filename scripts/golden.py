"""Golden values of the tests: what CreatiLayout's own classes answer, as numbers.

    MMDIT_LORA_PEERS=PEERS uv run python scripts/golden.py

`PEERS/CreatiLayout` is a checkout of HuiZhang0812/CreatiLayout at 860d8bd. Its classes are loaded, strictly, with the files of
`tests/creatilayout_files.py`. Writes `tests/golden/creatilayout.safetensors`; no code of it goes anywhere.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.creatilayout_files import layout
from tests.creatilayout_peer import BOXES, SCALES, checkout, peer_loop, peer_model, peer_velocity

OUT = Path(__file__).resolve().parent.parent / "tests" / "golden" / "creatilayout.safetensors"


def main() -> None:
    if checkout() is None:
        sys.exit("no checkout under $MMDIT_LORA_PEERS/CreatiLayout")
    values: dict[str, torch.Tensor] = {}
    for variant, dtype in (("sd3", torch.float32), ("sd3-lora", torch.float64), ("flux", torch.float32)):
        model = peer_model(variant, dtype)
        for boxes in BOXES:
            for scale in SCALES:
                velocity = peer_velocity(model, variant, layout(variant, boxes, dtype), scale, dtype)
                values[f"{variant}/{boxes}/{scale}"] = velocity.contiguous()
    with tempfile.TemporaryDirectory() as folder:
        for variant in ("sd3", "flux"):
            values[f"loop/{variant}"] = peer_loop(variant, Path(folder)).contiguous()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(values, OUT, metadata={"source": "HuiZhang0812/CreatiLayout at 860d8bd", "script": "scripts/golden.py"})
    print(f"wrote {OUT.name}: {len(values)} tensors, {OUT.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
