"""What is done on a machine with a GPU: `python -m benchmarks gpu-check` and its proofs."""
