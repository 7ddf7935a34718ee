"""Differences between models and between packs; a difference as a pack."""
