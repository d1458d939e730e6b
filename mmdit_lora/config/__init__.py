"""A run's config: its sections, its ranges, reading it."""
