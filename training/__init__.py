"""The slim training loop of Hidden Positives: run from the checkout, not installed."""

import os

# OpenMP threads that wait for each other sleep. By default they spin, and on a machine that does other work as well
# they take the processor from those they wait for. PyTorch's OpenMP reads it when it is loaded: set before that.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY") or "passive"
