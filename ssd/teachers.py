"""Networks that give targets: never in the optimiser, never with gradients, always in the mode they need.

A teacher is called like the student. Its mode while the module trains is set when it is built and
survives `train()` of whatever holds it; in evaluation it evaluates like everything else.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.backbones.base import Backbone, set_drop_path_zero
from ssd.batch import Tokens
from ssd.distributed import own_part
from ssd.errors import UserError
from ssd.normalisation import given_normalisation, put_back


class Teacher(nn.Module):
    """A network without gradients, without drop path and dropout.

    Args:
        network: what answers; owned by the teacher, so pass a copy.
        trains: whether normalisation layers use and gather batch statistics while the module trains.

    Attributes:
        follows: whether the teacher comes nearer to the student as it trains, so that it is what to export.
        rests: whether its answers are read and not asked for, so that it stays where it was built, whatever device its module
            goes to.
    """

    follows = False
    rests = False

    def __init__(self, network: nn.Module, trains: bool):
        super().__init__()
        self.trains = trains
        self.network = network.requires_grad_(False)
        set_drop_path_zero(self.network)
        self.train(self.training)

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return self.network(*args, **kwargs)

    def train(self, mode: bool = True):
        return super().train(mode and self.trains)

    def _apply(self, fn, recurse=True):
        """What moves a module to a device."""
        return self if self.rests else super()._apply(fn, recurse)


class EMA(Teacher):
    """An exponential moving average of the student, starting as its copy. Tarvainen and Valpola 2017.

    Args:
        student: the network to follow.
        buffers: what becomes of batch-norm statistics. "own": the teacher normalises by batch and gathers
            its own (DINO, MOKD); "average": they are averaged like parameters and the teacher evaluates.
        without: parameters of the student itself that the teacher has no use for, and so not at all (a mask token).
        shared: beginnings of the names of parameters that the teacher has from the student as they are, and not as averages.
    """

    follows = True

    def __init__(
        self, student: nn.Module, buffers: str = "own", without: Sequence[str] = (), shared: Sequence[str] = ()
    ):
        if buffers not in ("own", "average"):
            raise UserError(f"buffers: '{buffers}' is not a policy. Use 'own' or 'average'.")
        network = copy.deepcopy(student)
        for name in without:
            network.register_parameter(name, None)
        for beginning in shared:
            if not any(name.startswith(beginning) for name, _ in network.named_parameters()):
                raise UserError(
                    f"the student has no parameters '{beginning}...' for its teacher to share. Leave it out."
                )
        super().__init__(network, trains=buffers == "own")
        self.buffers_policy = buffers
        self.shared = tuple(shared)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """teacher <- m teacher + (1 - m) student for every parameter, in one fused call; what is shared is copied.

        Matched by name: the student may hold more (a mask token), never less.
        """
        theirs: dict[str, Tensor] = dict(student.named_parameters())
        mine: dict[str, Tensor] = dict(self.network.named_parameters())
        if self.buffers_policy == "average":
            theirs |= {name: buffer for name, buffer in student.named_buffers() if buffer.is_floating_point()}
            mine |= {name: buffer for name, buffer in self.network.named_buffers() if buffer.is_floating_point()}
        shared = [name for name in mine if name.startswith(self.shared)]
        averaged = [name for name in mine if name not in shared]
        for names, weight in ((averaged, 1 - momentum), (shared, 1.0)):
            if names:
                olds = [own_part(mine[name]) for name in names]
                news = [own_part(theirs[name].detach()) for name in names]
                torch._foreach_lerp_(olds, news, weight)


class Frozen(Teacher):
    """A network that never changes: a random one, a public one, or an earlier stage's student."""

    def __init__(self, network: nn.Module):
        super().__init__(network, trains=False)

    def update(self, student: nn.Module, momentum: float) -> None:
        """Nothing: it is frozen."""


class Preprocessed(nn.Module):
    """A backbone that was trained elsewhere, shown the student's pictures as it knows pictures: with its own mean and deviation,
    and at a size at which its patches lie where the student's do (196 px in patches of 14 for 224 px in patches of 16).

    Args:
        normalize: "data" = as the data normalises, "imagenet", "clip", or {"mean": [...], "std": [...]} in [0, 1] a channel.
        setting: what messages call `normalize`.
    """

    statistics: Tensor

    def __init__(
        self, backbone: Backbone, normalize: str | dict[str, list[float]] = "data", setting: str = "normalize"
    ):
        super().__init__()
        self.backbone = backbone
        given = given_normalisation(normalize, backbone.in_chans, setting)
        self.own_normalisation = given is not None
        self.register_buffer("statistics", torch.tensor(given or ((), ())), persistent=False)  # (2, C)

    def forward(self, pictures: Tensor, grid: tuple[int, int], normalisation: Tensor | None, **asked: Any) -> Tokens:
        """What the backbone answers to pictures (B, C, H, W), on the student's grid of patches.

        Args:
            normalisation: (2, C), of the pictures, as `Batch.normalisation`; needed for a normalisation of its own.
            asked: what else goes to the backbone: taps, until.
        """
        if self.own_normalisation:
            mean, std = self.statistics[:, :, None, None]
            pictures = (put_back(pictures, normalisation) - mean) / std
        rows, columns = as_pair(self.backbone.patch_size)
        size = (grid[0] * rows, grid[1] * columns)
        if tuple(pictures.shape[-2:]) != size:
            pictures = F.interpolate(pictures.float(), size, mode="bicubic", antialias=True)
        return self.backbone(pictures, **asked)


def as_pair(side: int | tuple[int, int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else side


class NoTeacher(nn.Module):
    """Stands where a method learns from the data alone, so that all that asks for a teacher finds one without a network."""

    follows = False
