"""Whole models and adapters in other formats."""
