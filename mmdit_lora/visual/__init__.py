"""Drawing boxes, contact sheets, charts (`charts`) and pages (`pages`)."""

from mmdit_lora.visual.drawing import (
    before_after,
    contact_sheet,
    draw_boxes,
    is_marked_png,
    phrase_colors,
    save_png,
)

__all__ = ["before_after", "contact_sheet", "draw_boxes", "is_marked_png", "phrase_colors", "save_png"]
