"""Merging packs into checkpoints, all of it numpy: no torch, no transformers."""
