"""Transformer blocks that normalise behind each residual sum, as the first transformers did and data2vec 2.0 does."""

import copy
import inspect
from typing import Any

import torch
from timm.models.vision_transformer import Block

from ssd.errors import UserError

WITH_POST_NORM = "Use a plain vision transformer, for instance vit_base_patch16_224, or leave post_norm out."


class PostNormBlock(Block):
    """x <- norm1(x + attn(x)), x <- norm2(x + mlp(x)), where timm's block has x <- x + attn(norm1(x))."""

    def forward(self, x: torch.Tensor, *args, **place) -> torch.Tensor:
        x = self.norm1(x + self.drop_path1(self.ls1(self.attn(x, *args, **place))))
        return self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))


def normalise_behind(model: Any, name: str) -> list[str]:
    """Gives a ViT that was built without a final norm blocks of this kind and a norm behind its embedding; the lines of
    Python that do the same elsewhere. The parameters of the blocks keep their names."""
    kinds = {type(block) for block in model.blocks}
    if kinds != {Block}:
        other = ", ".join(sorted(kind.__name__ for kind in kinds - {Block}))
        raise UserError(f"post_norm: the blocks of '{name}' are {other}. {WITH_POST_NORM}")
    for block in model.blocks:
        # the same weights and the same names, another way to run
        block.__class__ = PostNormBlock
    model.norm_pre = copy.deepcopy(model.blocks[0].norm1)
    return [
        "import copy",
        f"from {Block.__module__} import Block",
        inspect.getsource(PostNormBlock),
        f"for block in model.blocks:\n    block.__class__ = {PostNormBlock.__name__}",
        "model.norm_pre = copy.deepcopy(model.blocks[0].norm1)",
    ]
