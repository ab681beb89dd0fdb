"""The losses of a batch that is spread over many devices, exact: as if one process had all of it.

Each rank of a process group of torch.distributed has some rows of the batch, which is their concatenation in the order
of ranks.
"""
