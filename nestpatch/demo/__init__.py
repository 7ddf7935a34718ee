"""The demos: a pack from training to a patched model and back, with every number measured on the files that were written.

Public: `model` on a real chat model, `smollm2` which finds it, `lab` on the lab's model, and `stages`, which both share.
"""
