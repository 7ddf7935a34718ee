"""Fine-tuning a patched model without losing its pack: what a guard is, its file, and how torch keeps to it."""
