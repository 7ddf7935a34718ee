"""Durable files: atomic writes, copies, locks, scratch files, and files of unknown origin."""
