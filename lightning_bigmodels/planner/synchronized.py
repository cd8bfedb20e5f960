"""What torch's SyncBatchNorm sends, which itself runs on GPUs only."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import get_world_size
from torch.distributed._functional_collectives import all_gather_tensor, all_reduce
from torch.distributed.distributed_c10d import _get_default_group
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_bigmodels.strategies.batch_norm import SynchronizedBatchNorm


class _Layer(SynchronizedBatchNorm):
    """Keeps what batch norm of one process keeps, as that of all does on GPUs, and sends what that sends."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Return (B, C, ...), without values."""
        output = _BatchNorm.forward(self, input)
        group = self.process_group or _get_default_group()
        if not self.training or get_world_size(group) == 1:
            return output
        # mean and deviation of each channel, and how many values they are of
        all_gather_tensor(self._floats(2 * self.num_features + 1), 0, group)

        def send_back(_: Tensor) -> None:
            # the sums of the gradient and of its products with the input
            all_reduce(self._floats(2 * self.num_features), "sum", group)

        if output.requires_grad:
            output.register_hook(send_back)
        return output

    @staticmethod
    def _floats(number: int) -> Tensor:
        return torch.empty(number, dtype=torch.float32)


@contextmanager
def synchronized_as_on_cuda() -> Iterator[None]:
    """Let `trainer.sync_batchnorm` do what it does on GPUs: layers wait for two small collectives, one each way."""
    with mock.patch("lightning_bigmodels.strategies.batch_norm.SynchronizedBatchNorm", _Layer):
        yield
