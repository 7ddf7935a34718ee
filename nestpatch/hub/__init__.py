"""Models and patches on the Hugging Face Hub, or on a mirror of it (HF_ENDPOINT)."""
