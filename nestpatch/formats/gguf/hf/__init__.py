"""A GGUF file as the parts of a model directory of transformers: `model` joins configuration, tokenizer and float weights."""
