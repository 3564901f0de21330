import torch

from lightning_modules.ibot import IBOT
from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.views.recipes import DINOViews
from tests.contract import MethodContract

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
HEAD = {"head_hidden_dim": 16, "head_bottleneck_dim": 8}
VIEWS = DINOViews(global_size=32, local_size=16, local_count=2)


def tiny(**settings) -> IBOT:
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=32, arguments=VIT)
    return IBOT(backbone, **({"views": VIEWS, "num_prototypes": 32, **HEAD} | settings))


def random_batch(samples: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {
        "global": torch.randn(2, samples, 3, 32, 32, generator=generator),
        "local": torch.randn(2, samples, 3, 16, 16, generator=generator),
    }
    return Batch(views=views, index=torch.arange(samples), total=samples)


class TestContract(MethodContract):
    settings: dict = {}

    def make(self, **engine):
        # published rates are for long runs; a step of 1e-4 keeps Adam's sign noise below the tolerance
        return tiny(lr=1e-4, lr_rule="none", **self.settings, **engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


class TestContractOfOwnPrototypesAndCentresOverMaskedPatches(TestContract):
    settings = {"shared_head": False, "patch_center_over": "masked"}


class TestContractOfSinkhorn(TestContract):
    settings = {"target_rule": "sinkhorn"}
