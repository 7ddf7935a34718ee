"""Measuring a model: prompt suites, judges, drift and limits, by one evaluator for every runtime."""
