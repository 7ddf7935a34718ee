"""Whole models in other formats. Exporters read a Checkpoint, and do not know whether a patch is merged into what they read."""
