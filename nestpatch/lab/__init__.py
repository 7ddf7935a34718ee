"""A small world for the demo, the tests and the benchmarks: prompt sets, and a chat model that refuses half of what it should.

Public: `build`.
"""
