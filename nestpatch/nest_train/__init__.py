"""The trainer: a base model and prompts in, a pack out. Imports torch and transformers."""
