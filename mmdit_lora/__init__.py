"""Layout LoRA adapters for multimodal diffusion transformers (MM-DiT).

The public names are imported when they are first used: `import mmdit_lora` loads neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdit_lora.data.collate import LayoutCollator
    from mmdit_lora.data.dataset import LayoutDataset
    from mmdit_lora.evaluation.evaluate import evaluate
    from mmdit_lora.export.export import export_adapter
    from mmdit_lora.layout import Box, Layout
    from mmdit_lora.lora import add_layout_lora, load_adapter, save_adapter
    from mmdit_lora.pipelines import load_pipeline
    from mmdit_lora.training.callbacks import Callback
    from mmdit_lora.training.encoding import LayoutEncoder
    from mmdit_lora.training.loss import flow_matching_loss
    from mmdit_lora.training.trainer import train

__version__ = "0.1.0"
__all__ = [
    "Box",
    "Callback",
    "Layout",
    "LayoutCollator",
    "LayoutDataset",
    "LayoutEncoder",
    "__version__",
    "add_layout_lora",
    "evaluate",
    "export_adapter",
    "flow_matching_loss",
    "load_adapter",
    "load_pipeline",
    "save_adapter",
    "train",
]
_MODULES = {
    "Box": "layout",
    "Callback": "training.callbacks",
    "Layout": "layout",
    "LayoutCollator": "data.collate",
    "LayoutDataset": "data.dataset",
    "LayoutEncoder": "training.encoding",
    "add_layout_lora": "lora",
    "evaluate": "evaluation.evaluate",
    "export_adapter": "export.export",
    "flow_matching_loss": "training.loss",
    "load_adapter": "lora",
    "load_pipeline": "pipelines",
    "save_adapter": "lora",
    "train": "training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
