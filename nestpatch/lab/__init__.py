"""A tiny world for the demo, the tests and the benchmarks: text, prompt sets, and a small chat model that is half aligned."""
