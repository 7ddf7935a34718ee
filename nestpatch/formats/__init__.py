"""What is on disk: one file per format, the same few names in each."""
