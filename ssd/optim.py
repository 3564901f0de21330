"""Optimiser rules: which parameters decay, how learning rates follow the batch, how gradients are clipped.

Rules are frozen values; the engine applies them. Each published recipe names its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ssd.backbones.base import Backbone
from ssd.errors import UserError
from ssd.schedules import Schedule


@dataclass(frozen=True)
class OptimizerRule:
    """Makes an optimiser for parameter groups. Learning rate and decay are written by the engine at each step."""

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        raise TypeError(f"{type(self).__name__} must say how it is built")


@dataclass(frozen=True)
class AdamW(OptimizerRule):
    """Loshchilov and Hutter 2019, in torch's fused form."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.AdamW(groups, lr=0.0, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=True)


@dataclass(frozen=True)
class SGD(OptimizerRule):
    momentum: float = 0.9

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum)


@dataclass(frozen=True)
class LARS(OptimizerRule):
    """Layer-wise adaptive rates (You et al. 2017) as DINO's ResNet-50 uses them: 1-D tensors neither adapt nor decay.

    Args:
        trust_coefficient: share of |w| / |g| that becomes the local rate.
    """

    momentum: float = 0.9
    trust_coefficient: float = 0.001

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return LARSOptimizer(groups, momentum=self.momentum, trust_coefficient=self.trust_coefficient)


class LARSOptimizer(Optimizer):
    """mu <- m mu + q (g + wd w), w <- w - lr mu, with q = c |w| / |g + wd w| for tensors of two or more
    dimensions (1 where either norm is 0) and q = 1, no decay, for vectors."""

    def __init__(self, groups: Iterable[Any], momentum: float, trust_coefficient: float):
        defaults = {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "trust_coefficient": trust_coefficient}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim != 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    weight_norm, update_norm = parameter.norm(), update.norm()
                    local_rate = group["trust_coefficient"] * weight_norm / update_norm
                    update = update * torch.where((weight_norm > 0) & (update_norm > 0), local_rate, 1.0)
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.sub_(state["momentum_buffer"] * group["lr"])


def decays_unless_bias_or_1d(name: str, parameter: Tensor) -> float:
    """DINO and iBOT: biases and vectors are free of decay; position embeddings, class token and (K, 1) gains are not."""
    return float(not (name.endswith(".bias") or parameter.ndim == 1))


def decays_unless_bias_norm_or_scale(name: str, parameter: Tensor) -> float:
    """DINOv2: biases and everything named norm or gamma are free of decay."""
    return float(not (name.endswith(".bias") or "norm" in name or "gamma" in name))


def decays_unless_bias_and_norms_by_a_tenth(name: str, parameter: Tensor) -> float:
    """CAPI: biases are free of decay, gains of normalisations decay by a tenth, all else wholly."""
    return 0.0 if name.endswith(".bias") else 0.1 if "norm" in name else 1.0


def decays(name: str, parameter: Tensor) -> float:
    """All alike, as torch does it where nothing is said."""
    return 1.0


DECAY_RULES = {
    "bias_and_1d": decays_unless_bias_or_1d,
    "bias_norm_and_scale": decays_unless_bias_norm_or_scale,
    "bias_and_norms_by_a_tenth": decays_unless_bias_and_norms_by_a_tenth,
    "none": decays,
}


def parameter_groups(
    module: nn.Module, decay_rule: str, layer_decay: float = 1.0, patch_embed_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Trainable parameters of a module, grouped by how they are trained.

    Each group says what its weight decay and its learning rate are multiplied by (`decays`, `lr_scale`), and whether it is a
    `last_layer`, which may be frozen at first. With L blocks, a backbone's parameters at depth i, 0 for what comes before
    the blocks and L + 1 behind them, learn at layer_decay^(L + 1 - i) (DINOv2); a mask token counts as coming before.

    Raises UserError for a rule that is not in DECAY_RULES, or a scale without a patch embedding to apply it to.
    """
    if decay_rule not in DECAY_RULES:
        raise UserError(f"decay_rule: '{decay_rule}' is unknown. Choose one of {', '.join(sorted(DECAY_RULES))}.")
    scales = lr_scales(module, layer_decay, patch_embed_lr_scale)
    groups: dict[tuple[float, float, bool], list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            kind = (DECAY_RULES[decay_rule](name, parameter), scales[name], "last_layer" in name)
            groups.setdefault(kind, []).append(parameter)
    return [
        {"params": parameters, "decays": share, "lr_scale": scale, "last_layer": last_layer}
        for (share, scale, last_layer), parameters in groups.items()
    ]


def lr_scales(module: nn.Module, layer_decay: float, patch_embed_lr_scale: float) -> dict[str, float]:
    """What the learning rate of each parameter is multiplied by."""
    scales = {name: 1.0 for name, _ in module.named_parameters()}
    for place, backbone in module.named_modules():
        if not isinstance(backbone, Backbone):
            continue
        prefix = f"{place}." if place else ""
        behind = backbone.num_blocks + 1
        for name, depth in backbone.depths().items():
            scales[f"{prefix}{name}"] = layer_decay ** (behind - depth)
        beside = place.rpartition(".")[0]
        token = f"{beside}.mask_token" if beside else "mask_token"
        if token in scales:
            scales[token] = layer_decay**behind
    if patch_embed_lr_scale != 1:
        embeddings = [name for name in scales if "patch_embed" in name]
        if not embeddings:
            raise UserError(
                f"patch_embed_lr_scale: {patch_embed_lr_scale} finds no patch embedding in this backbone. Use 1."
            )
        for name in embeddings:
            scales[name] *= patch_embed_lr_scale
    return scales


LR_RULES = {"linear": lambda share: share, "sqrt": lambda share: share**0.5, "none": lambda share: 1.0}


def resolve_lr(lr: float | Schedule, rule: str, reference_batch: int, batch: int) -> float | Schedule:
    """The learning rate for a global batch: the peak times batch / reference (linear) or its root (sqrt).

    The floor of a schedule is not scaled (Caron et al. 2021, released code) unless it is `scaled_end`. Raises UserError for an
    unknown rule.
    """
    if rule not in LR_RULES:
        raise UserError(f"lr_rule: '{rule}' is unknown. Choose one of {', '.join(LR_RULES)}.")
    factor = LR_RULES[rule](batch / reference_batch)
    return lr.scaled(factor) if isinstance(lr, Schedule) else lr * factor


@dataclass(frozen=True)
class Clip:
    """Keeps gradients below a norm, over one of three ranges.

    Args:
        max_norm: L2 norm above which gradients are scaled down to it.
        over: "tensor", each parameter by itself (DINO, iBOT); "module", backbone and each head by itself
            (DINOv2); "all", one norm over everything.
    """

    max_norm: float
    over: str = "tensor"

    def __post_init__(self):
        if self.over not in ("tensor", "module", "all"):
            raise UserError(f"clip over '{self.over}' is unknown. Choose 'tensor', 'module' or 'all'.")
        if not self.max_norm > 0:
            raise UserError(
                f"clip at max_norm {self.max_norm} would erase gradients. Use a positive norm, or null for none."
            )

    def apply(self, gradients: list[Tensor], norms: Tensor, modules: list[str]) -> None:
        """Scales `gradients` in place by max_norm / (norm + 1e-6) where that is below 1.

        Args:
            norms: (P,) L2 norm of each gradient.
            modules: for each gradient the module it belongs to, used by "module".
        """
        if self.over == "tensor":
            joint = norms
        elif self.over == "all":
            joint = torch.linalg.vector_norm(norms).expand_as(norms)
        else:
            names = sorted(set(modules))
            member = torch.tensor([names.index(module) for module in modules], device=norms.device)
            squares = torch.zeros(len(names), device=norms.device).index_add(0, member, norms.square())
            joint = squares.sqrt()[member]
        scales = (self.max_norm / (joint + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(scales.unbind()))


@dataclass(frozen=True)
class Optimized:
    """What one optimiser trains, and how. A method with several students names one of these for each.

    Args:
        decay_rule, layer_decay, patch_embed_lr_scale: as in `parameter_groups`.
    """

    module: nn.Module
    optimizer: OptimizerRule
    lr: float | Schedule
    weight_decay: float | Schedule
    clip: Clip | None
    decay_rule: str
    layer_decay: float = 1.0
    patch_embed_lr_scale: float = 1.0

    def groups(self) -> list[dict[str, Any]]:
        """Its parameters by how they are trained."""
        return parameter_groups(self.module, self.decay_rule, self.layer_decay, self.patch_embed_lr_scale)
