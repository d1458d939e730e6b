"""Adapters for other tools: writing, reading back, comparing."""
