"""What is done to a whole network so that it runs elsewhere or faster, values unchanged."""

import torch
from torch import nn

from ssd.backbones.base import Backbone
from ssd.errors import UserError


def compile_blocks(network: nn.Module) -> None:
    """Compiles every backbone inside `network` block by block, in place, so that state dict names stay."""
    for module in network.modules():
        if isinstance(module, Backbone):
            for block in module.blocks:
                block.compile()


def synchronise_batch_norm(network: nn.Module, device: torch.device) -> None:
    """Batch statistics over all ranks, in place. Raises UserError where torch cannot: on the CPU."""
    if device.type == "cpu":
        raise UserError(
            "batch normalisation cannot be synchronised over CPU processes. Use one process, a network and head without "
            "batch normalisation, or allow each process its own statistics with ghost_norm: true."
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(network)
