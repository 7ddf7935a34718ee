"""Differences: between two models or two packs (`diff`), and of two models as a pack (`extract`)."""
