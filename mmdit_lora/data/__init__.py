"""Data sets in: readers, transforms, procedural scenes, collation."""
