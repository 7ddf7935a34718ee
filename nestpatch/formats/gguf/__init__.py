"""GGUF files: `header` reads and writes headers, `quants` knows the types, `names` the tensor names, `checkpoint` the rows."""
