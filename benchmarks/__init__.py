"""Time and memory of the ops, of the published way to compute them and of other libraries: ``python -m benchmarks``."""
