"""Stochastic depth that saves what it drops: a residual branch runs on the rows that keep it, and on no others."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssd.errors import UserError

RULES = ("linear", "uniform", "subset")


def set_drop_path(blocks: nn.ModuleList | nn.Sequential, rate: float, rule: str) -> None:
    """Gives the blocks of a timm transformer, built with the linear rule, another one.

    "linear" grows from 0 in the first block to `rate` in the last; "uniform" is `rate` in all of them; so is "subset",
    which draws how many rows keep a branch no more, but which (`SubsetBlock`). Raises UserError for another rule.
    """
    if rule not in RULES:
        raise UserError(f"drop_path_rule: '{rule}' is unknown. Choose one of {', '.join(RULES)}.")
    if rule == "linear" or rate == 0:
        return
    for block in blocks:
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        if rule == "subset":
            if type(block) not in SUBSET:
                raise UserError(
                    f"drop_path_rule: 'subset' does not know the block {type(block).__name__}. Use 'uniform' or 'linear'."
                )
            # the same weights and the same names, another way to run
            block.__class__ = SUBSET[type(block)]


class SubsetDropPath:
    """Mixed into a timm block: of B rows, max(int(B (1 - d)), 1) drawn ones pass a branch and its result is added to
    them, scaled by B over their number, so that the expectation is the whole branch. Attention and MLP draw apart.
    Oquab et al. 2023, arXiv 2304.07193, section 5."""

    def forward(self: Any, x: Tensor, *args: Any, **place: Any) -> Tensor:
        rate = self.drop_path1.drop_prob
        if not self.training or not rate:
            return super().forward(x, *args, **place)  # type: ignore[misc]
        x = add_on_subset(x, rate, lambda rows, kept: self.attention_branch(rows, **rows_of(place, kept)))
        return add_on_subset(x, rate, lambda rows, kept: self.mlp_branch(rows))


class SubsetBlock(SubsetDropPath, Block):
    def attention_branch(self, x: Tensor, **place: Any) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), **place))

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))


class SubsetEvaBlock(SubsetDropPath, EvaBlock):
    def attention_branch(self, x: Tensor, **place: Any) -> Tensor:
        added = self.attn(self.norm1(x), **place)
        return added if self.gamma_1 is None else self.gamma_1 * added

    def mlp_branch(self, x: Tensor) -> Tensor:
        added = self.mlp(self.norm2(x))
        return added if self.gamma_2 is None else self.gamma_2 * added


SUBSET: dict[type, type] = {Block: SubsetBlock, EvaBlock: SubsetEvaBlock}


def add_on_subset(x: Tensor, rate: float, branch: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(B, N, D) -> the same, with `branch(rows, which)` added to the drawn rows (B',) alone, scaled by B / B'."""
    batch = len(x)
    keep = max(int(batch * (1 - rate) + 1e-9), 1)
    kept = torch.randperm(batch, device=x.device)[:keep]
    added = branch(x.index_select(0, kept), kept)
    return x.index_add(0, kept, added.to(x.dtype), alpha=batch / keep)


def rows_of(place: dict[str, Any], kept: Tensor) -> dict[str, Any]:
    """What goes with the rows of a batch, for those that are kept: positions of its own are (B, heads or 1, N, d)."""
    return {
        name: value.index_select(0, kept) if isinstance(value, Tensor) and value.ndim == 4 else value
        for name, value in place.items()
    }
