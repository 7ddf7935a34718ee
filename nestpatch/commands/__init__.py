"""The commands, by what they do to a model. cli.py puts them together."""
