"""Kills nestpatch, and makes its disk fail, at every single system call."""
