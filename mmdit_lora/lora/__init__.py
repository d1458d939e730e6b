"""LoRA on the layout stream, on PEFT: find targets, add, freeze, verify, report, save, load, merge."""

from mmdit_lora.lora.adapt import (
    TARGETS,
    LayoutLoraReport,
    adapter_shapes,
    add_layout_lora,
    default_lora_config,
    find_targets,
    lora_parameters,
    merge_adapter,
    refuse_zero_gates,
    remove_adapter,
)
from mmdit_lora.lora.storage import (
    CONFIG_FILE,
    HEADER_KEY,
    KEY_PREFIX,
    WEIGHTS_FILE,
    base_fingerprint,
    load_adapter,
    lora_state_dict,
    read_adapter_config,
    read_adapter_header,
    save_adapter,
)

__all__ = [
    "CONFIG_FILE",
    "HEADER_KEY",
    "KEY_PREFIX",
    "TARGETS",
    "WEIGHTS_FILE",
    "LayoutLoraReport",
    "adapter_shapes",
    "add_layout_lora",
    "base_fingerprint",
    "default_lora_config",
    "find_targets",
    "load_adapter",
    "lora_parameters",
    "lora_state_dict",
    "merge_adapter",
    "read_adapter_config",
    "read_adapter_header",
    "refuse_zero_gates",
    "remove_adapter",
    "save_adapter",
]
