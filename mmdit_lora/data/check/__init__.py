"""`data check`: what is in a data set and what is wrong with it. Begin with `report.check_dataset`."""

from mmdit_lora.data.check.findings import Example, Finding
from mmdit_lora.data.check.images import quick_check
from mmdit_lora.data.check.report import CheckReport, check_dataset
from mmdit_lora.data.check.texts import clip_tokens
from mmdit_lora.data.records import read_written

__all__ = ["CheckReport", "Example", "Finding", "check_dataset", "clip_tokens", "quick_check", "read_written"]
