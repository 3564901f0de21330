"""Heads for maps of features: one that was made for pooled vectors, carried over to every place, and those that learn it."""

from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from ssd.backbones.positions import sincos_positions
from ssd.errors import UserError


class SpatialReLU(nn.Module):
    """Keeps a channel's whole map where its sum is above 0, else none of it: the mean of what is kept is the ReLU of the mean.

    Huang and Guo 2022, section 3.2. (B, C, h, w) -> (B, C, h, w)
    """

    def forward(self, maps: Tensor) -> Tensor:
        return maps * (maps.sum((2, 3), keepdim=True, dtype=torch.float32) > 0)


def spatial_adaptor(head: nn.Sequential) -> nn.Sequential:
    """A head of pooled vectors as one of maps: pooling what it answers gives what the head answers to the pooled map.

    Linear layers become convolutions of 1 x 1, batch normalisation, which must evaluate, that of maps, ReLU `SpatialReLU`; the
    weights are the head's own, in copies. (B, D, h, w) -> (B, d, h, w). Raises UserError for other layers, which pooling does
    not commute with.
    """
    return nn.Sequential(*(adapted(layer) for layer in head)).eval()


def adapted(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Linear):
        convolution = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
        state = layer.state_dict()
        convolution.load_state_dict(state | {"weight": state["weight"][:, :, None, None]})
        return convolution
    if isinstance(layer, nn.BatchNorm1d) and layer.track_running_stats:
        norm = nn.BatchNorm2d(layer.num_features, eps=layer.eps, affine=layer.affine)
        norm.load_state_dict(layer.state_dict())
        return norm
    if isinstance(layer, nn.ReLU):
        return SpatialReLU()
    raise UserError(
        f"a head with {type(layer).__name__} cannot be used at every place of a map. Use one of linear layers, batch "
        "normalisation with running statistics and ReLU, or no head."
    )


class PixelHead(nn.Sequential):
    """Projector and predictor of MoCo v3's shape at every place: (B, in_dim, h, w) -> (B, out_dim, h, w).

    Convolutions of 1 x 1 of `hidden_dim`, `out_dim`, `hidden_dim` and `out_dim` channels, each followed by batch
    normalisation, without gain and bias behind the narrow ones, and the wide ones by ReLU.

    Args:
        batch_norm: false leaves it out and gives convolutions a bias.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, batch_norm: bool = True):
        layers: list[nn.Module] = []
        widths = [in_dim, hidden_dim, out_dim, hidden_dim, out_dim]
        for number, (width_in, width_out) in enumerate(zip(widths, widths[1:], strict=False)):
            narrow = number % 2 == 1
            layers.append(nn.Conv2d(width_in, width_out, 1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(width_out, affine=not narrow)] if batch_norm else []
            layers += [] if narrow else [nn.ReLU()]
        super().__init__(*layers)


class MapAttention(nn.Module):
    """One block of self-attention over the places of a map, added to it: (B, D, h, w) -> (B, D, h, w).

    Layer normalisation first, fixed positions of rows and columns added behind it.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UserError(
                f"attention_heads: {num_heads} do not divide the {dim} channels of the map. Use a divisor, or 0."
            )
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, qkv_bias=True)

    def forward(self, maps: Tensor) -> Tensor:
        rows, columns = maps.shape[2:]
        tokens = maps.flatten(2).mT  # (B, N, D)
        positions = sincos_positions((rows, columns), tokens.shape[2]).to(tokens)
        mixed: Any = self.attention(self.norm(tokens) + positions)
        return (tokens + mixed).mT.unflatten(2, (rows, columns))
