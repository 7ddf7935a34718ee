"""Measuring a model: prompt suites, judges, drift and limits, with one evaluator for every runtime.

`evaluator.evaluate` is the way in; `parity` compares an exported file with the model that it was made from.
"""
