"""The losses of a batch that is spread over many devices, exact: as if one process had all of it.

Each rank of a process group of torch.distributed has some rows of the batch, which is their concatenation in the order
of ranks. Every rank gets the loss of the whole batch, and the gradient of its own rows.

How gradients are scaled. `DistributedDataParallel` takes the mean of the gradients of parameters over ranks. The loss
of the whole batch is one number, and each rank has the part of its gradient that goes through its own rows: the sum
over ranks is wanted. So with ``ddp=True``, the default, the gradient is multiplied by the number of ranks; DDP's mean
is then the gradient of one process with the whole batch, to the rounding of sums. With ``ddp=False`` it is the gradient
of the loss with respect to the rank's own rows, for those who add up gradients themselves. The value of the loss is the
same. A gradient is multiplied by what flows back into the rank's own loss: all ranks must use the loss alike.

Without an initialised torch.distributed, and in a group of one rank, the losses are those of one process.
"""

from hpkernels.distributed.contrastive import contrastive
from hpkernels.distributed.ghp_contrastive import ghp_contrastive

__all__ = ["contrastive", "ghp_contrastive"]
