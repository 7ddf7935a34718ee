"""The Hugging Face Hub, or a mirror of it (HF_ENDPOINT): its client, and models there as checkpoints."""
