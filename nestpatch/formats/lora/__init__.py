"""A pack as a low-rank adapter: PEFT, llama.cpp and onnxruntime."""
