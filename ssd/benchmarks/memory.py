"""What a piece of work holds at its highest."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(work: Callable[[], Any], device: str = "cpu") -> int:
    """The most that `work` held at once of the tensors it made, forward and backward; what an operation takes for
    itself and gives back is counted on a GPU alone."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Held() as held:
        work()
    return held.peak


class Held(TorchDispatchMode):
    """Counts the bytes of tensors made inside that still live, and the most they were."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self.see(tensor, made_here=False)
        answer = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            self.see(tensor, made_here=True)
        return answer

    def see(self, tensor: Any, made_here: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self.live:
            return
        size = storage.nbytes() if made_here else 0

        def gone(_: weakref.ref) -> None:
            del self.live[place]
            self.now -= size

        self.live[place] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
