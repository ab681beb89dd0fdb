"""Other ways to compute an op: published code, plain PyTorch written for speed, and libraries where installed.

Importing this enters all of them into the registry.
"""

from benchmarks.peers import chunked, losses, plain, published, search  # noqa: F401
