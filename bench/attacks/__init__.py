"""Attacks on a patched model, by someone who controls the prompt, the start of the answer, or the weights.

Each module is one attack. All of them take a loaded model and the `Material` of `material`, and know nothing of packs;
`pruning` alone reads which neurons a pack changes. `bench.adaptive` runs them.
"""
