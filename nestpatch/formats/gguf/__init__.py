"""GGUF files: header, types, tensor names, and the checkpoint."""
