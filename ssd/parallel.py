"""What is done to a whole network so that it runs elsewhere or faster, values unchanged."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ssd.backbones.base import Backbone
from ssd.backbones.transformer import Transformer
from ssd.distributed import is_sharded
from ssd.errors import UserError


def compile_blocks(network: nn.Module) -> None:
    """Compiles every backbone inside `network` block by block, in place, so that state dict names stay."""
    for block in blocks_in(network):
        block.compile()


def blocks_in(network: nn.Module) -> list[nn.Module]:
    """The blocks of every backbone inside `network`, and of a transformer that stands alone, each once."""
    found = {
        id(block): block
        for module in network.modules()
        if isinstance(module, Backbone | Transformer)
        for block in module.blocks
    }
    return list(found.values())


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Spreads parameters over the ranks of a mesh, in place, and gathers them block by block as they are used (FSDP2).

    Each backbone's blocks are units of their own, and what is left of the network is one. All are given back after their
    forward pass, a teacher's too: an average over ranks' shards then meets shards on both sides.
    """
    for block in blocks_in(network):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def load_whole(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads a whole state, which every rank holds, into a network that is spread over ranks or not."""
    if not any(is_sharded(parameter) for parameter in network.parameters()):
        network.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(network, dict(state), options=StateDictOptions(full_state_dict=True))


def synchronise_batch_norm(network: nn.Module, device: torch.device) -> None:
    """Batch statistics over all ranks, in place. Raises UserError where torch cannot: on the CPU."""
    if device.type == "cpu":
        raise UserError(
            "batch normalisation cannot be synchronised over CPU processes. Use one process, a network and head without "
            "batch normalisation, or allow each process its own statistics with ghost_norm: true."
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(network)
