"""FSDP2 under Lightning for networks that do not fit, with checkpoints that are those of any other run."""

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ssd.weights.checkpoint import read_file


class Sharded(ModelParallelStrategy):
    """Student, teachers and optimiser spread over all processes (FSDP2), parameters gathered block by block as they are used.

    Gradients, clipping, averages and losses are those of `ddp`. A checkpoint is one file, as a run on one process or under
    `ddp` writes it, and each of them goes on with the other's.

    Args:
        settings: process_group_backend, timeout; of Lightning's `ModelParallelStrategy`.
    """

    def __init__(self, **settings: Any):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole, on rank 0, with parameters numbered as torch numbers them: through the optimiser's groups."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_optimizer_state_dict(self._network, optimizer, options=options)
        if self.global_rank != 0:
            return {}
        number = {name: place for place, name in enumerate(self._names(optimizer))}
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
        return {"state": {number[name]: moments for name, moments in state["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """What a file holds; weights and moments go to where this rank has its part of them at once."""
        checkpoint = read_file(self.broadcast(checkpoint_path))
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self._network, checkpoint["state_dict"], options=options)
        # a parameter that never had a gradient, a frozen prototype, has no moments yet
        options = StateDictOptions(full_state_dict=True, strict=False)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self._network, optimizer, self._named(optimizer, state), options=options)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for place, parameter in enumerate(parameters):
                if place not in state["state"]:
                    optimizer.state.pop(parameter, None)  # torch has made some up
        return checkpoint

    def _named(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        names = self._names(optimizer)
        groups = [{**group, "params": [names[place] for place in group["params"]]} for group in state["param_groups"]]
        return {"state": {names[place]: moments for place, moments in state["state"].items()}, "param_groups": groups}

    def _names(self, optimizer: Optimizer) -> list[str]:
        name_of = {id(parameter): name for name, parameter in self._network.named_parameters()}
        return [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]

    @property
    def _network(self) -> torch.nn.Module:
        assert self.model is not None
        return self.model
