"""Prompt sets: the built-in ones, and readers of files and data sets."""
