"""The trainer: a base model and prompts in, a Pack out. The only part that imports torch and transformers."""
