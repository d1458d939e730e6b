"""Detect objects in images, and measure how well they obey layouts."""
