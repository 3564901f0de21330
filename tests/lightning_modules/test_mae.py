import math

import pytest
import torch
from torch.testing import assert_close

from lightning_modules.mae import MAE
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.batch import Batch, Masks
from ssd.errors import UserError
from ssd.masked_branch import Decoded, MaskedBranch, painted, pixel_targets
from ssd.masking.recipes import BlockMasks, RandomMasks
from ssd.normalisers import patchified
from ssd.views.recipes import CropViews
from tests.contract import MethodContract, start

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def tiny(**settings) -> MAE:
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=32, fixed_positions=True, arguments=VIT)
    return MAE(backbone, **{"views": CropViews(size=32), **DECODER} | settings)


def random_batch(samples: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {"global": torch.randn(1, samples, 3, 32, 32, generator=generator)}
    return Batch(views=views, index=torch.arange(samples), total=samples)


def masked_batch(module: MAE, samples: int, seed: int) -> Batch:
    batch = random_batch(samples, seed)
    batch.masks["global"] = module.mask_plans()["global"].draw(samples, 0, seed)
    return batch


class TestContract(MethodContract):
    def make(self, **engine):
        return tiny(**{"lr": 1e-4, "lr_rule": "none"} | engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


def loss_of(module: MAE, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return module.losses(batch, module.targets(batch))["pixels"]


def restated(module: MAE, batch: Batch) -> torch.Tensor:
    """Picture by picture and patch by patch, with plain timm parts and loops."""
    model, decoder = module.student.backbone.model, module.student.decoder
    total, count = 0.0, 0
    for picture, hidden in zip(batch.views["global"][0], batch.masks["global"].boolean[0]):
        corners = [(row, column) for row in range(4) for column in range(4)]
        squares = [picture[:, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] for r, c in corners]
        tokens = model.patch_embed(picture[None])[0].flatten(0, 1) + model.pos_embed[0, 1:]
        seen = [place for place in range(16) if not hidden[place]]
        sequence = torch.cat([(model.cls_token + model.pos_embed[:, :1])[0], tokens[seen]])[None]
        for block in model.blocks:
            sequence = block(sequence)
        embedded = decoder.embed(model.norm(sequence))[0]
        rows = [embedded[0]]
        for place in range(16):
            token = embedded[1 + seen.index(place)] if place in seen else decoder.mask_token[0, 0]
            angle = torch.outer(
                torch.tensor([place % 4, place // 4], dtype=torch.float64), 1e4 ** (-torch.arange(4) / 4)
            )
            wave = torch.cat([angle[0].sin(), angle[0].cos(), angle[1].sin(), angle[1].cos()]).float()
            rows.append(token + wave)
        whole = torch.stack(rows)[None]
        for block in decoder.blocks:
            whole = block(whole)
        answers = decoder.head(decoder.norm(whole))[0, 1:]
        for place in range(16):
            if hidden[place]:
                pixels = squares[place].permute(1, 2, 0).flatten()
                pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
                total = total + ((answers[place] - pixels) ** 2).mean()
                count += 1
    return total / count


def test_the_loss_is_that_of_the_paper_written_out():
    module = tiny()
    batch = masked_batch(module, 3, 1)
    with torch.no_grad():
        assert_close(loss_of(module, batch), restated(module, batch), atol=1e-5, rtol=1e-5)


def test_pixels_of_hidden_patches_reach_the_target_and_not_the_student():
    module = tiny().eval()
    batch = masked_batch(module, 2, 0)
    visible = batch.masks["global"].visible
    with torch.no_grad():
        before = module.student(batch.views["global"], visible).patches
    place = int(batch.masks["global"].masked[0, 0, 0])
    row, column = divmod(place, 4)
    old = module.targets(batch).pixels.clone()
    batch.views["global"][0, 0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = torch.randn(3, 8, 8)
    with torch.no_grad():
        assert torch.equal(module.student(batch.views["global"], visible).patches, before)
    moved = (module.targets(batch).pixels != old).any(-1)
    assert moved.nonzero().tolist() == [[0, 0, place]]


def test_visible_patches_cost_nothing_and_a_wrong_hidden_one_does():
    module = tiny(normalize_pixels=False)
    batch = masked_batch(module, 2, 0)
    targets = module.targets(batch)
    masks = batch.masks["global"].boolean

    class Says(torch.nn.Module):
        def __init__(self, offset):
            super().__init__()
            self.offset = offset

        def forward(self, pictures, visible):
            from ssd.masked_branch import Decoded

            return Decoded(targets.pixels + self.offset, None, None)

    module.student = Says(torch.where(masks[..., None], 0.0, 5.0))
    assert module.losses(batch, targets)["pixels"] == 0
    module.student = Says(torch.where(masks[..., None], 2.0, 0.0))
    assert_close(module.losses(batch, targets)["pixels"], torch.tensor(4.0))


def test_the_encoder_sees_a_quarter_and_its_positions_are_fixed():
    module = tiny()
    batch = masked_batch(module, 2, 0)
    assert batch.masks["global"].visible.shape == (1, 2, 4)
    positions = module.student.backbone.model.pos_embed
    assert not positions.requires_grad and not positions[0, 0].any()
    theta = 1e4 ** (-1 / 6)  # 24 dimensions: 6 frequencies of each coordinate, columns first
    assert_close(
        positions[0, 1 + 6, [1, 7, 13, 19]],
        torch.tensor([math.sin(2 * theta), math.cos(2 * theta), math.sin(theta), math.cos(theta)]),
    )
    optimizers = start(module)
    before = positions.clone()
    module.take_step(batch, optimizers)
    assert torch.equal(positions, before)


def test_a_constant_answer_costs_the_variance_of_standardised_pixels():
    """p p C - 1 over p p C: the variance of a patch is made 1 in its unbiased form."""
    module = tiny()
    with torch.no_grad():
        module.student.decoder.head.weight.zero_()
        module.student.decoder.head.bias.zero_()
    assert_close(loss_of(module, masked_batch(module, 8, 0)), torch.tensor(191 / 192), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"masks": BlockMasks()}, "Use RandomMasks"),
        ({"masks": RandomMasks(0.0)}, "a ratio of 0 hides nothing"),
        ({"decoder_heads": 3}, "heads that divide the width"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        tiny(**settings)


def test_a_network_that_cannot_encode_visible_patches_is_refused():
    with pytest.raises(UserError, match="visible"):
        MAE(ConvNet("resnet18"), views=CropViews(size=32))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_network_that_predicts_the_target_paints_the_picture(monkeypatch, normalize):
    module = tiny(normalize_pixels=normalize)
    batch = masked_batch(module, 3, 0)
    first, masks = batch.views["global"][:1], batch.masks["global"]
    one = Masks(masks.boolean[:1], masked=masks.masked[:1], visible=masks.visible[:1])
    right = pixel_targets(first, module.patch, normalize)
    monkeypatch.setattr(MaskedBranch, "forward", lambda network, pictures, visible: Decoded(right, None, None))
    assert_close(painted(module.student, first[0], one, normalize), first[0], atol=1e-4, rtol=1e-4)

    monkeypatch.setattr(MaskedBranch, "forward", lambda network, pictures, visible: Decoded(right + 1, None, None))
    wrong = painted(module.student, first[0], one, normalize)
    changed = patchified((wrong - first[0]).abs(), module.patch).amax(-1) > 1e-3
    assert (changed == one.boolean[0]).all(), "what is seen stays as it is"
