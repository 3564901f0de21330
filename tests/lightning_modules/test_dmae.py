import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_modules.dmae import DMAE
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.masking.recipes import BlockMasks, RandomMasks
from ssd.views.recipes import CropViews
from tests.contract import MethodContract, start
from tests.lightning_modules.test_mae import DECODER, VIT, random_batch

TEACHER = {"embed_dim": 40, "depth": 4, "num_heads": 2, "patch_size": 8}


def vit(**arguments) -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=32, fixed_positions=True, arguments={**VIT, **arguments})


def tiny(**settings) -> DMAE:
    torch.manual_seed(0)
    defaults = {"views": CropViews(size=32), "lr": 1e-4, "lr_rule": "none", **DECODER}
    return DMAE(
        settings.pop("backbone", None) or vit(), settings.pop("teacher", None) or vit(**TEACHER), **defaults | settings
    )


def masked_batch(module: DMAE, samples: int, seed: int):
    batch = random_batch(samples, seed)
    batch.masks["global"] = module.mask_plans()["global"].draw(samples, 0, seed)
    return batch


def terms(module: DMAE, batch) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return module.losses(batch, module.targets(batch))


class TestContract(MethodContract):
    def make(self, **engine):
        return tiny(**engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


def test_features_are_those_of_the_blocks_three_quarters_through_on_the_same_visible_patches():
    module = tiny(masks=RandomMasks(keep=5))
    assert (module.student_block, module.teacher_block) == (1, 3)
    batch = masked_batch(module, 3, 0)
    visible = batch.masks["global"].visible[0]
    with torch.no_grad():
        sequences = []
        for backbone, last in ((module.student.backbone, 1), (module.teacher.network, 3)):
            model = backbone.model
            whole = model._pos_embed(model.patch_embed(batch.views["global"][0]))
            rows = [torch.cat([row[:1], row[1:][seen]]) for row, seen in zip(whole, visible)]
            sequence = torch.stack(rows)
            for block in model.blocks[:last]:
                sequence = block(sequence)
            sequences.append(sequence)
        mine = F.normalize(module.student.projectors["block1"](sequences[0]), dim=-1)
        theirs = F.normalize(sequences[1], dim=-1)
    assert theirs.shape == (3, 6, 40)
    assert_close(terms(module, batch)["feature"], (mine - theirs).abs().mean(), atol=1e-6, rtol=1e-5)


def test_the_teacher_stops_behind_its_tap_and_what_lies_behind_may_be_anything():
    module = tiny()
    batch = masked_batch(module, 2, 0)
    before = terms(module, batch)
    last = module.teacher.network.model.blocks[3]
    calls = []
    last.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.fill_(float("nan"))
    after = terms(module, batch)
    assert after == before and not calls


def test_hidden_pixels_reach_the_pixels_term_and_not_the_features():
    module = tiny()
    batch = masked_batch(module, 2, 0)
    before = terms(module, batch)
    row, column = divmod(int(batch.masks["global"].masked[0, 0, 0]), 4)
    batch.views["global"][0, 0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
    after = terms(module, batch)
    assert after["feature"] == before["feature"] and after["pixel"] != before["pixel"]


def test_a_student_that_is_its_teacher_pays_nothing_for_features_and_gets_no_gradient_of_them():
    module = tiny(backbone=vit(), teacher=vit(), student_block=1, teacher_block=1)
    module.student.backbone.load_state_dict(module.teacher.network.state_dict())
    projector = module.student.projectors["block1"][0]
    with torch.no_grad():
        projector.weight.copy_(torch.eye(24))
    batch = masked_batch(module, 2, 0)
    assert terms(module, batch)["feature"] == 0
    module.losses(batch, module.targets(batch))["feature"].backward()
    gradients = [parameter.grad for parameter in module.student.parameters() if parameter.grad is not None]
    assert gradients and all(not gradient.any() for gradient in gradients)


def test_worked_distance_of_two_axes():
    """e1 against e2 in four dimensions: .5."""
    from ssd.losses.regression import absolute_error

    axes = torch.eye(4)
    assert absolute_error(axes[0], axes[1]) == 0.5


def test_weights_switch_the_terms_and_only_them():
    first, second = tiny(pixel_weight=0.0), tiny(pixel_weight=0.0)
    second.feature_weight = 0.0
    batch = masked_batch(first, 4, 0)
    assert first.take_step(batch, start(first)).total == pytest.approx(first.last_report.terms["feature"])
    second.take_step(batch, start(second))
    assert second.last_report.total == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"masks": BlockMasks()}, "Use RandomMasks"),
        ({"teacher_block": 5}, "Use 1 to 4"),
        ({"student_block": 0}, "Use 1 to 2"),
        ({"distance": "l3"}, "Choose one of l1, l2"),
        ({"teacher": {"patch_size": 16}}, "networks of one square patch"),
        ({"teacher": {"class_token": False}}, "networks with as many"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    if isinstance(settings.get("teacher"), dict):
        arguments = {**TEACHER, **settings["teacher"]}
        settings = {"teacher": ViT("vit_tiny_patch16_224", img_size=32, arguments=arguments)}
    with pytest.raises(UserError, match=said):
        tiny(**settings)


def test_without_pixels_all_patches_may_be_seen():
    """Plain regression of features: nothing is hidden, so pixels cost nothing and the features are of whole pictures."""
    module = tiny(masks=RandomMasks(0.0), pixel_weight=0.0)
    batch = masked_batch(module, 3, 0)
    with torch.no_grad():
        targets = module.targets(batch)
        found = module.losses(batch, targets)
        whole = module.teacher(batch.views["global"][0], taps=(3,), until=3).taps["block3"]
    assert targets.features.shape == (1, 3, 17, 40)
    assert_close(targets.features[0], F.normalize(whole, dim=-1))
    assert found["pixel"] == 0 and found["feature"] > 0
    with pytest.raises(UserError, match="a ratio of 0 hides nothing"):
        tiny(masks=RandomMasks(0.0))
