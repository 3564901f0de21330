"""Heads, and `Branch`: backbone and head as the one network that a step runs."""

from itertools import groupby

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ssd.backbones.base import Backbone
from ssd.batch import Scores
from ssd.distributed import own_part
from ssd.errors import UserError
from ssd.precision import product_dtype

ROWS_AT_A_TIME = 2048
"""Of a K x d weight on a CPU: what is read, computed and written of so many stays in cache."""


class WeightNorm(torch.autograd.Function):
    """Row k of v at unit length, times gain g_k: exact, reading v once each way.

    v (K, d), g (K, 1) -> (K, d) in `dtype`. With u = v / |v|: dL/dg = <dw, u> and dL/dv = g / |v| (dw - <dw, u> u)
    (Salimans and Kingma 2016, eq. 3). Autograd through a division by the norm costs several times more, and so does
    every further K x d tensor that is taken from memory and given back.
    """

    @staticmethod
    def forward(ctx, direction: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
        norm = torch.empty_like(gain)
        weight = torch.empty_like(direction, dtype=dtype)
        for rows in rows_in_turn(direction):
            torch.linalg.vector_norm(direction[rows], dim=1, keepdim=True, out=norm[rows])
            weight[rows] = direction[rows] * (gain[rows] / norm[rows])
        ctx.save_for_backward(direction, gain, norm)
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        direction, gain, norm = ctx.saved_tensors
        of_direction, of_gain = torch.empty_like(direction), torch.empty_like(gain)
        for rows in rows_in_turn(direction):
            part, unit = grad[rows].to(direction.dtype), direction[rows] / norm[rows]
            along = of_gain[rows] = torch.linalg.vecdot(part, unit).unsqueeze(1)
            torch.addcmul(part, unit, along, value=-1, out=of_direction[rows]).mul_(gain[rows] / norm[rows])
        return of_direction, of_gain if ctx.needs_input_grad[1] else None, None


def rows_in_turn(weight: Tensor) -> list[slice]:
    at_a_time = ROWS_AT_A_TIME if weight.device.type == "cpu" else len(weight)
    return [slice(first, first + at_a_time) for first in range(0, len(weight), at_a_time)]


class Prototypes(nn.Module):
    """K directions of length d with a gain each: a bias-free linear layer under weight normalisation.

    Args:
        train_gain: False holds every gain at 1, so that logits are cosines in [-1, 1] (`norm_last_layer`
            in the published code); True lets gains learn: better for ViT-S, unstable for larger models.
    """

    def __init__(self, dim: int, num_prototypes: int, train_gain: bool = False):
        super().__init__()
        check_num_prototypes(num_prototypes)
        self.weight_v = nn.Parameter(nn.Linear(dim, num_prototypes, bias=False).weight.detach())
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=train_gain)

    def forward(self) -> Tensor:
        """(K, d), rows of length g_k, in the dtype that they will be multiplied in."""
        return WeightNorm.apply(self.weight_v, self.weight_g, product_dtype(self.weight_v))


class PlainPrototypes(nn.Module):
    """K directions of length d without weight normalisation, drawn like the other layers (DINOv3)."""

    def __init__(self, dim: int, num_prototypes: int):
        super().__init__()
        check_num_prototypes(num_prototypes)
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_prototypes, dim), std=0.02))

    def forward(self) -> Tensor:
        """(K, d), rows of any length, in the dtype that they will be multiplied in."""
        # a copy: a sharded network's parameters are given back when its forward pass ends
        return self.weight.to(product_dtype(self.weight), copy=True)


class UnitPrototypes(nn.Module):
    """K directions that are brought back to unit length after every step instead of inside it.

    Another path of training than weight normalisation: the gradient along a direction, which weight normalisation takes
    out, is taken and undone. It saves the passes over K x d numbers that weight normalisation costs in each forward and
    backward pass, and there are no gains.
    """

    def __init__(self, dim: int, num_prototypes: int):
        super().__init__()
        check_num_prototypes(num_prototypes)
        self.weight = nn.Parameter(F.normalize(torch.randn(num_prototypes, dim), dim=1))

    def forward(self) -> Tensor:
        """(K, d), in the dtype that they will be multiplied in."""
        # a copy: a sharded network's parameters are given back when its forward pass ends
        return self.weight.to(product_dtype(self.weight), copy=True)

    @torch.no_grad()
    def restore_length(self) -> None:
        """Every row at unit length; of a sharded network those that this rank holds."""
        weight = own_part(self.weight.detach())
        for rows in rows_in_turn(weight):
            weight[rows] /= torch.linalg.vector_norm(weight[rows], dim=1, keepdim=True).clamp_min(1e-12)


class BiasedPrototypes(nn.Module):
    """K directions of length d with a bias each, drawn normal: a linear layer. The bias is one more number of each
    prototype, for features that end in 1."""

    def __init__(self, dim: int, num_prototypes: int):
        super().__init__()
        check_num_prototypes(num_prototypes)
        self.weight = nn.Parameter(torch.randn(num_prototypes, dim))
        self.bias = nn.Parameter(torch.zeros(num_prototypes))

    def forward(self) -> Tensor:
        """(K, d + 1), in the dtype that they will be multiplied in."""
        return torch.cat([self.weight, self.bias[:, None]], dim=1).to(product_dtype(self.weight))


PROTOTYPES = (Prototypes, PlainPrototypes, UnitPrototypes)
"""Every form that prototypes have in a head."""


def restore_lengths(network: nn.Module) -> None:
    """Brings the prototypes of a network that are kept at unit length back to it."""
    for part in network.modules():
        if isinstance(part, UnitPrototypes):
            part.restore_length()


def make_prototypes(
    dim: int, num_prototypes: int, *, train_gain: bool = False, weight_norm: bool = True, renormalize: bool = False
) -> Prototypes | PlainPrototypes | UnitPrototypes:
    """Prototypes under weight normalisation, with gains that learn or not, renormalised after each step, or plain.

    Raises UserError for gains that learn where there are none.
    """
    if renormalize and train_gain:
        raise UserError(
            "renormalize_prototypes: true keeps prototypes at unit length, and norm_last_layer: false lets their lengths "
            "learn. Set norm_last_layer: true with it."
        )
    if renormalize:
        return UnitPrototypes(dim, num_prototypes)
    return Prototypes(dim, num_prototypes, train_gain) if weight_norm else PlainPrototypes(dim, num_prototypes)


def check_num_prototypes(num_prototypes: int) -> None:
    if num_prototypes < 1:
        raise UserError(
            f"num_prototypes: {num_prototypes} is not a positive count. The published value is 65536; "
            "1024 suits fewer than 20,000 pictures."
        )


class PrototypeHead(nn.Module):
    """MLP to a bottleneck, unit length there, then prototypes: the head of DINO, iBOT and DINOv2.

    Caron et al. 2021, appendix C. Linear weights are normal with deviation .02, biases 0. Without the
    bottleneck's unit length, three layers or more collapse in the published ablation.

    Args:
        in_dim: width of the features that come in.
        num_prototypes: K.
        hidden_dim, bottleneck_dim: widths of the MLP and of the features compared with prototypes, d.
        num_layers: linear layers before the prototypes, the bottleneck included.
        batch_norm: after each hidden layer; as published for ResNet-50, and much better on small data.
        train_gain: see `Prototypes`.
        weight_norm: false for `PlainPrototypes`.
        renormalize: `UnitPrototypes` instead.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        batch_norm: bool = False,
        train_gain: bool = False,
        weight_norm: bool = True,
        renormalize: bool = False,
    ):
        super().__init__()
        if num_layers < 1:
            raise UserError(f"head_layers: {num_layers} is not a positive count. The published value is 3.")
        widths = [in_dim] + [hidden_dim] * (num_layers - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for i, (width_in, width_out) in enumerate(zip(widths, widths[1:], strict=False)):
            last = i == num_layers - 1
            linear = nn.Linear(width_in, width_out)
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            if not last:
                layers += [nn.BatchNorm1d(width_out)] if batch_norm else []
                layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers)
        self.last_layer = make_prototypes(
            bottleneck_dim, num_prototypes, train_gain=train_gain, weight_norm=weight_norm, renormalize=renormalize
        )

    def forward(self, features: Tensor) -> Scores:
        """(..., D) -> Scores with features (..., d) of unit length and prototypes (K, d)."""
        bottleneck = self.mlp(features.flatten(0, -2))
        # directions need more than half precision
        bottleneck = F.normalize(bottleneck.to(torch.promote_types(bottleneck.dtype, torch.float32)), dim=-1)
        return Scores(bottleneck.unflatten(0, features.shape[:-1]), self.last_layer())


class DirectHead(nn.Module):
    """Prototypes compared with the features themselves, at unit length: no MLP before them, gains that learn (CAPI).

    Darcet et al. 2025, arXiv 2502.08769, section 3. Directions are drawn with deviation .02.
    """

    def __init__(self, in_dim: int, num_prototypes: int):
        super().__init__()
        self.last_layer = Prototypes(in_dim, num_prototypes, train_gain=True)
        nn.init.trunc_normal_(self.last_layer.weight_v, std=0.02)

    def forward(self, features: Tensor) -> Scores:
        """(..., D) -> Scores with features (..., D) of unit length and prototypes (K, D)."""
        # directions need more than half precision
        exact = features.to(torch.promote_types(features.dtype, torch.float32))
        return Scores(F.normalize(exact, dim=-1), self.last_layer())


class Branch(nn.Module):
    """Backbone and head as one network, called once a step with all views it is to see.

    Neighbouring views of one size go through the backbone together, view-major; the head sees all at once.
    """

    def __init__(self, backbone: Backbone, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: dict[str, Tensor]) -> Scores:
        """name -> (V, B, C, H, W) -> the head's answer for (S, B, D), S counting views in the order given."""
        features = []
        for _, same_size in groupby(views.values(), key=lambda pictures: pictures.shape[2:]):
            pictures = torch.cat(list(same_size))
            pooled = self.backbone(pictures.flatten(0, 1)).pooled()
            features.append(pooled.unflatten(0, pictures.shape[:2]))
        return self.head(torch.cat(features))
