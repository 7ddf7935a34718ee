"""Prompt sets, read from files and data sets."""
