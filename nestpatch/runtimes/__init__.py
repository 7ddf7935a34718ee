"""What runs a model: transformers, llama.cpp and onnxruntime."""
