"""The Hugging Face Hub and plain web servers, read without trusting them: look-ups, whole files, ranges, a remote model."""
