"""Packs that give a fine-tune its safety back, made of checkpoints without training: `transplant`, `extrapolate`, `carry`."""
