"""What is in an adapter, and what the LoRA papers found: studies, inspection, resizing."""
