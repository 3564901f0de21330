"""Where a value that is not finite comes from, once a step was skipped for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssd.batch import Batch, map_tensors
from ssd.resume import generator_states, restore_generators


def origin(method: Any, batch: Batch) -> str | None:
    """Name of what is first not finite on this rank: a weight, or the layer whose output is, as a skipped step is
    computed again without gradients; None where every layer's output is finite.

    All ranks call this, because targets reduce over them. Nothing of the method changes: random state and normalisation
    statistics are put back.
    """
    for name, parameter in method.named_parameters():
        if not bool(parameter.detach().sum().isfinite()):
            return f"weight {name}"
    states, statistics = generator_states(), method.normalisation_statistics()
    try:
        with torch.no_grad(), first_not_finite(method) as found:
            targets = method.targets(batch)
            for number in range(method.micro_batches):
                method.losses(batch.part(number, method.micro_batches), targets.part(number, method.micro_batches))
    finally:
        restore_generators(states)
        for buffer, saved in statistics:
            buffer.copy_(saved)
    return found[0] if found else None


@contextmanager
def first_not_finite(module: nn.Module) -> Iterator[list[str]]:
    """Names, in the order in which they ran, of the layers inside whose output was not finite."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(layer: nn.Module, inputs: Any, output: Any) -> None:
            tensors: list[Tensor] = []
            map_tensors(output, lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
            if any(map(not_finite, tensors)):
                found.append(name)

        return look

    handles = [
        part.register_forward_hook(watch(name)) for name, part in module.named_modules() if not list(part.children())
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def not_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())
