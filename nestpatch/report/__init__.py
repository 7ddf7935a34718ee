"""One self-contained HTML page about a pack, a model or an evaluation."""
