"""Heads that frozen networks were trained with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssd.errors import UserError
from ssd.record import Recorded
from ssd.weights.checkpoint import is_checkpoint, read_file, strict_load
from ssd.weights.public import read_public


class Projection(Recorded, nn.Sequential):
    """Projector of contrastive methods: linear layers, each followed by batch normalisation, with ReLU between them. It
    evaluates always.

    Args:
        widths: of what comes in and of each layer: published are [2048, 4096, 256] (MoCo v3, ResNet-50) and
            [768, 4096, 4096, 256] (ViT-B).
        bias: of the linear layers.
        last_norm: whether the last layer too is normalised, without gain and bias.
        weights: a file of MoCo v3, or FILE#NAME for the layers NAME.0, NAME.1 and so on of any other.
    """

    def __init__(
        self, widths: Sequence[int], *, bias: bool = False, last_norm: bool = True, weights: str | None = None
    ):
        if len(widths) < 2 or min(widths) < 1:
            raise UserError(f"widths: {list(widths)} make no layer. Give two or more, as [2048, 4096, 256].")
        layers: list[nn.Module] = []
        for number, (width_in, width_out) in enumerate(zip(widths, widths[1:], strict=False), 2):
            layers.append(nn.Linear(width_in, width_out, bias=bias))
            if number < len(widths):
                layers += [nn.BatchNorm1d(width_out), nn.ReLU()]
            elif last_norm:
                layers.append(nn.BatchNorm1d(width_out, affine=False))
        super().__init__(*layers)
        self.in_dim, self.out_dim = widths[0], widths[-1]
        if weights is not None:
            strict_load(self, read_layers(weights), f"weights '{weights}'")
        self.eval()

    def train(self, mode: bool = True):
        return super().train(False)

    def record(self) -> dict[str, Any]:
        """Without `weights`: whoever rebuilds from a record loads the state that was saved beside it."""
        record = super().record()
        record["init_args"].pop("weights", None)
        return record


def read_layers(weights: str) -> Mapping[str, Tensor]:
    """State of a sequence of layers in a file, keys from the number of the layer on."""
    file, name = weights, ""
    if not Path(weights).exists() and "#" in weights:
        file, _, name = weights.rpartition("#")
    contents = read_file(file)
    if is_checkpoint(contents):
        raise UserError(
            f"{file} is a checkpoint of a run of this project, whose heads are of another form. Leave teacher_head out, so "
            "that the teacher's own features are the target."
        )
    if not name:
        found = read_public(contents, "teacher", file).heads.get("projector", {})
    else:
        state = contents.get("state_dict", contents)
        found = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    if not found:
        raise UserError(
            f"{file} has no {f'layers under {name!r}' if name else 'projector of MoCo v3'}. Name the layers after the file, as "
            "FILE#module.projector."
        )
    return found
