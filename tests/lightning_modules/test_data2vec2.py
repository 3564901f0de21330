import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from lightning_modules.data2vec2 import Data2Vec2
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.batch import Batch, Masks
from ssd.errors import UserError
from ssd.masked_branch import Decoded
from ssd.masking.recipes import BlockMasks, InverseSquareMasks
from ssd.schedules import Linear
from ssd.views.recipes import CropViews
from tests.contract import MethodContract, run_rank, run_steps, start
from tests.lightning_modules.test_mae import random_batch

VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
SMALL = {
    "num_masks": 3,
    "top_blocks": 2,
    "decoder_dim": 16,
    "decoder_depth": 2,
    "decoder_groups": 4,
    # noise is drawn anew for each slice and process, so what must be equal has none
    "decoder_noise": 0.0,
}


def vit(**settings) -> ViT:
    arguments = {**VIT, **settings.pop("arguments", {})}
    return ViT(
        "vit_tiny_patch16_224",
        img_size=32,
        arguments=arguments,
        **{"post_norm": True, "fixed_positions": True} | settings,
    )


def tiny(make=vit, **settings) -> Data2Vec2:
    torch.manual_seed(0)
    defaults = {"views": CropViews(size=32), "lr": 1e-4, "lr_rule": "none", **SMALL}
    return Data2Vec2(make(), **defaults | settings)


learned_positions = partial(vit, fixed_positions=False)


def masked_batch(module: Data2Vec2, samples: int, seed: int) -> Batch:
    batch = random_batch(samples, seed)
    batch.masks["global"] = module.mask_plans()["global"].draw(samples, 0, seed)
    return batch


class TestContract(MethodContract):
    def make(self, **engine):
        return tiny(**{"momentum": 0.9} | engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


class TestContractOfTheTeacherThatShares(TestContract):
    def make(self, **engine):
        return tiny(learned_positions, momentum=0.9, teacher_shares=["patches", "positions"], **engine)


def terms_of(module: Data2Vec2, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return module.losses(batch, module.targets(batch))


# ------------------------------------------------------------------ the equations, in loops


def forward(model, sequence: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One picture's tokens (1 + n, D) through post-norm blocks: what comes out, and what each MLP answered."""
    answers = []
    for block in model.blocks:
        qkv = block.attn.qkv(sequence).unflatten(-1, (3, 2, 16)).permute(1, 2, 0, 3)  # (3, heads, n, d)
        mixed = torch.softmax(qkv[0] @ qkv[1].mT / 4, -1) @ qkv[2]
        sequence = block.norm1(sequence + block.attn.proj(mixed.transpose(0, 1).flatten(1)))
        answers.append(block.mlp.fc2(F.gelu(block.mlp.fc1(sequence))))
        sequence = block.norm2(sequence + answers[-1])
    return sequence, answers


def embedded(model, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Class token (D,), which has no position, and patches (16, D) with theirs, before the first norm."""
    squares = [picture[:, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] for r in range(4) for c in range(4)]
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    patches = torch.stack([(weight * square).sum((1, 2, 3)) + bias for square in squares])
    return model.cls_token[0, 0], patches + model.pos_embed[0, -16:]


def target_of(model, picture: Tensor) -> Tensor:
    """(16, D): of the last two MLPs each channel over the patches, then the mean, then each patch over its channels."""
    cls, patches = embedded(model, picture)
    _, answers = forward(model, model.norm_pre(torch.cat([cls[None], patches])))
    layers = []
    for answer in answers[-2:]:
        tokens = answer[1:]
        layers.append((tokens - tokens.mean(0)) / (tokens.var(0, correction=0) + 1e-5).sqrt())
    mean = (layers[0] + layers[1]) / 2
    return (mean - mean.mean(1, keepdim=True)) / (mean.var(1, keepdim=True, correction=0) + 1e-5).sqrt()


def restated(module: Data2Vec2, batch: Batch) -> tuple[Tensor, Tensor]:
    """Picture by picture, mask by mask and token by token."""
    model, decoder = module.student.backbone.model, module.student.decoder
    regression, hidden_tokens, cls_loss = torch.zeros(()), 0, torch.zeros(())
    pictures, masks = batch.views["global"][0], batch.masks["global"].boolean
    for sample, picture in enumerate(pictures):
        target = target_of(module.teacher.network.backbone.model, picture)
        cls, patches = embedded(model, picture)
        for mask in masks[:, sample]:
            seen = [place for place in range(16) if not mask[place]]
            out, _ = forward(model, model.norm_pre(torch.cat([cls[None], patches[seen]])))
            plane = torch.zeros(32, 4, 4)
            for row, place in enumerate(seen):
                plane[:, place // 4, place % 4] = out[1 + row]
            for layer in decoder.layers:
                moved = F.conv2d(plane[None], layer.weight, layer.bias, padding=1, groups=4)[0]
                moved = (moved - moved.mean(0)) / (moved.var(0, correction=0) + 1e-5).sqrt()
                moved = F.gelu(moved)
                plane = plane + moved if plane.shape == moved.shape else moved
            for place in range(16):
                if mask[place]:
                    predicted = decoder.head(plane[:, place // 4, place % 4])
                    regression = regression + ((predicted - target[place]) ** 2).sum() / math.sqrt(32)
                    hidden_tokens += 1
            cls_loss = cls_loss + ((out[0] - target.mean(0)) ** 2).sum() / math.sqrt(32)
    return regression / hidden_tokens, cls_loss / (len(pictures) * len(masks))


def test_both_terms_are_those_of_the_paper_written_out():
    module = tiny(momentum=0.9)
    run_steps(module, [masked_batch(module, 4, 0)])  # teacher and student are no longer the same
    batch = masked_batch(module, 3, 1)
    found = terms_of(module, batch)
    with torch.no_grad():
        regression, cls = restated(module, batch)
    assert_close(found["features"], regression, atol=1e-5, rtol=1e-4)
    assert_close(found["cls"], cls, atol=1e-5, rtol=1e-4)


def test_two_views_of_a_picture_are_two_pictures_with_masks_of_their_own():
    module = tiny()
    batch = masked_batch(module, 4, 0)
    masks = batch.masks["global"]
    views = {"global": batch.views["global"].reshape(2, 2, 3, 32, 32)}
    # (M, V B) as (M V, B): all views under their first mask, then under their second
    cut = Masks(*(value.reshape(6, 2, -1) for value in (masks.boolean, masks.masked, masks.visible)))
    two = Batch(views=views, index=torch.arange(2), total=2, masks={"global": cut})
    found, expected = terms_of(module, two), terms_of(module, batch)
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


# ------------------------------------------------------------------ targets


def test_the_teacher_is_called_once_a_step_with_every_picture_once_and_whole():
    module = tiny()
    calls = []
    hook = lambda network, arguments, settings, answer: calls.append((arguments[0].shape, settings.get("visible")))
    module.teacher.network.backbone.register_forward_hook(hook, with_kwargs=True)
    run_steps(module, [masked_batch(module, 4, seed) for seed in range(2)])
    assert calls == [((4, 3, 32, 32), None)] * 2


def test_every_mask_of_a_picture_has_the_same_target_whatever_is_hidden():
    module = tiny()
    batch, other = masked_batch(module, 4, 0), masked_batch(module, 4, 1)
    other.views = batch.views
    assert (batch.masks["global"].boolean != other.masks["global"].boolean).any()
    features = module.targets(batch).features
    assert features.shape == (1, 4, 16, 32), "one copy for all three masks"
    assert torch.equal(features, module.targets(other).features)
    batch.views["global"] = batch.views["global"].clone()
    batch.views["global"][0, 0, :, :8, :8] += 1
    assert (module.targets(batch).features[0, 0] != features[0, 0]).any(-1).all(), "the teacher sees every patch"


def test_student_and_teacher_begin_alike_and_no_decoder_is_averaged():
    module = tiny()
    student, teacher = module.student.state_dict(), module.teacher.network.state_dict()
    assert teacher.keys() == {name for name in student if name.startswith("backbone.")}
    assert all(torch.equal(student[name], value) for name, value in teacher.items())
    batch = masked_batch(module, 2, 0)
    with torch.no_grad():
        assert_close(
            module.targets(batch).features[0, 1], target_of(module.student.backbone.model, batch.views["global"][0, 1])
        )


def test_targets_are_of_the_mlp_and_not_of_the_block_and_the_class_token_does_not_count():
    module = tiny()
    batch = masked_batch(module, 2, 0)
    expected = module.targets(batch).features
    with torch.no_grad():
        # what a later norm does to the residual stream is no part of the last MLP's answer
        module.teacher.network.backbone.blocks[-1].norm2.weight.mul_(7)
        assert torch.equal(module.targets(batch).features, expected)
        taps = module.teacher(batch.views["global"][0], taps=["block3.mlp"]).taps
    assert taps["block3.mlp"].shape == (2, 17, 32)


def test_each_layer_weighs_alike_however_large_it_is():
    """Averaging before normalising would leave of two layers the larger one alone."""
    module = tiny()
    batch = masked_batch(module, 2, 0)
    with torch.no_grad():
        mlp = module.teacher.network.backbone.blocks[-1].mlp.fc2
        mlp.weight.mul_(100)  # for the eps of the norm not to tell the two scales below apart
        mlp.bias.mul_(100)
        expected = module.targets(batch).features
        mlp.weight.mul_(1000)
        mlp.bias.mul_(1000)
        assert_close(module.targets(batch).features, expected, atol=2e-3, rtol=0)


def test_targets_are_normalised_in_single_precision():
    module = tiny()
    batch = masked_batch(module, 2, 0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        features = module.targets(batch).features
    assert features.dtype == torch.float32
    assert_close(features.mean(-1), torch.zeros(1, 2, 16), atol=1e-5, rtol=0)
    assert_close(features.var(-1, correction=0), torch.ones(1, 2, 16), atol=1e-3, rtol=0)


# ------------------------------------------------------------------ the loss


class Says(torch.nn.Module):
    """A student that is off its targets by what it is told, (M, B, N, 1) and (M, B, 1)."""

    def __init__(self, targets: Tensor, patches: Tensor, cls: Tensor):
        super().__init__()
        self.answer = targets + patches, targets.mean(2) + cls

    def forward(self, pictures, visible):
        class Seen:
            cls = self.answer[1].flatten(0, 1)

        return Decoded(self.answer[0], None, Seen())


def told(module: Data2Vec2, batch: Batch, at_hidden: float, at_visible: float, at_cls: float) -> dict[str, Tensor]:
    targets = module.targets(batch)
    masks = batch.masks["global"].boolean
    patches = torch.where(masks[..., None], at_hidden, at_visible)
    module.student = Says(targets.features, patches, torch.full((len(masks), len(batch), 1), at_cls))
    return module.losses(batch, targets)


def test_hidden_patches_alone_cost_an_error_of_one_the_root_of_their_width():
    module = tiny()
    batch = masked_batch(module, 2, 0)
    found = told(module, batch, 1.0, 100.0, 2.0)
    assert_close(found["features"], torch.tensor(math.sqrt(32)))
    assert_close(found["cls"], torch.tensor(4 * math.sqrt(32)), atol=1e-4, rtol=1e-5)
    assert told(tiny(), batch, 0.0, 5.0, 0.0)["features"] == 0


@pytest.mark.parametrize(("rule", "factor"), [("mean", 1), ("sum", 2)])
def test_the_published_class_term_doubles_with_the_batch_and_ours_stays(rule, factor):
    small, large = tiny(cls_rule=rule), tiny(cls_rule=rule)
    two, four = masked_batch(small, 2, 0), masked_batch(large, 4, 0)
    found = told(small, two, 1.0, 0.0, 1.0)["cls"], told(large, four, 1.0, 0.0, 1.0)["cls"]
    assert_close(found[1], factor * found[0])
    assert_close(found[0], torch.tensor(math.sqrt(32) * (1 if rule == "mean" else 2 * 3)), atol=1e-4, rtol=1e-5)


def test_the_default_weight_is_what_the_published_rule_came_to():
    """Published: .01 of a sum over 16 pictures of 16 masks."""
    mean, published = tiny(num_masks=16), tiny(num_masks=16, cls_rule="sum", cls_weight=0.01)
    batch = masked_batch(mean, 16, 0)
    weighed = [float(module.at("cls_weight") * told(module, batch, 1, 0, 1)["cls"]) for module in (mean, published)]
    assert weighed[0] == pytest.approx(weighed[1], rel=1e-5)


class SumRule(TestContract):
    def make(self, **engine):
        return super().make(cls_rule="sum", **engine)


SumRule.__test__ = False


def test_under_the_published_rule_two_processes_with_half_the_batch_each_have_half_the_term(pair):
    alone = SumRule().make()
    expected = run_steps(alone, [SumRule().batch_for(alone, 0)])[0]
    for reports, _, _ in pair.run(run_rank, SumRule, False):
        assert reports[0][0]["cls"] == pytest.approx(expected["cls"] / 2, rel=1e-4)
        assert reports[0][0]["features"] == pytest.approx(expected["features"], rel=1e-4)


def test_slices_add_up_under_the_published_rule_too():
    whole, sliced = tiny(cls_rule="sum"), tiny(cls_rule="sum", micro_batches=2)
    expected = run_steps(whole, [masked_batch(whole, 4, 0)])[0]
    assert run_steps(sliced, [masked_batch(sliced, 4, 0)])[0] == pytest.approx(expected, rel=1e-5)


def test_without_a_class_term_a_backbone_without_class_token_learns():
    make = partial(learned_positions, arguments={"class_token": False})
    with pytest.raises(UserError, match="no class token"):
        tiny(make)
    module = tiny(make, cls_weight=0.0)
    assert run_steps(module, [masked_batch(module, 4, 0)])[0].keys() == {"features"}


def test_pixels_of_hidden_patches_do_not_reach_the_predictions():
    module = tiny().eval()
    batch = masked_batch(module, 2, 0)
    masks = batch.masks["global"]
    with torch.no_grad():
        before = module.student(batch.views["global"], masks.visible)
    hidden = masks.boolean[1, 0].unflatten(0, (4, 4)).repeat_interleave(8, 0).repeat_interleave(8, 1)
    batch.views["global"][0, 0][:, hidden] = float("nan")
    with torch.no_grad():
        after = module.student(batch.views["global"], masks.visible)
    assert torch.equal(after.patches[1, 0], before.patches[1, 0])
    assert torch.equal(after.tokens.cls[2], before.tokens.cls[2]), "row 2 is the second mask of the first picture"
    assert after.patches[0, 0].isnan().all(), "under another mask they are seen"


# ------------------------------------------------------------------ masks, teacher, time


@pytest.mark.parametrize(
    ("masks", "size", "patch", "kept"),
    [
        (InverseSquareMasks(0.2, adjust=0.07), 224, 16, 39),
        (InverseSquareMasks(0.25, adjust=0.1), 224, 16, 49),
        (InverseSquareMasks(0.25, adjust=0.1), 224, 14, 64),
        (InverseSquareMasks(0.2, adjust=0.07), 32, 4, 12),
    ],
)
def test_every_mask_keeps_as_many_patches_as_published(masks, size, patch, kept):
    arguments = {**VIT, "depth": 2, "patch_size": patch}
    make = partial(ViT, "vit_tiny_patch16_224", img_size=size, post_norm=True, arguments=arguments)
    module = tiny(make, masks=masks, num_masks=16, views=CropViews(size=size))
    drawn = module.mask_plans()["global"].draw(2, 0, 0)
    assert drawn.visible.shape == (16, 2, kept)
    assert ((~drawn.boolean).sum(-1) == kept).all()
    assert len({row.numpy().tobytes() for row in drawn.boolean.flatten(0, 1)}) == 32


def test_momentum_is_the_published_one():
    module = tiny()
    module.begin(375_300, 5_004)
    found = [module.value_of(module.momentum, step) for step in (0, 50_000, 100_000, 375_299)]
    assert found == pytest.approx([0.9998, 0.999895, 0.99999, 0.99999], abs=1e-9)
    huge = Linear(0.9998, 1.0, until="300000 steps", reaches_end=False)
    assert [huge.value(step, 500_000, 5004) for step in (0, 150_000, 300_000)] == pytest.approx([0.9998, 0.9999, 1.0])


def test_every_tensor_of_the_teacher_follows_and_a_constant_is_approached_as_one_minus_a_power():
    module = tiny(momentum=0.9)
    with torch.no_grad():
        for parameter in module.teacher.parameters():
            parameter.zero_()
        for parameter in module.student.parameters():
            parameter.fill_(1.0)
    for _ in range(5):
        module.teacher.update(module.student, 0.9)
    for name, parameter in module.teacher.named_parameters():
        assert_close(parameter.detach(), torch.full_like(parameter, 1 - 0.9**5), msg=lambda m, n=name: f"{n}: {m}")


def test_the_teacher_moves_once_a_step_however_many_slices():
    module = tiny(momentum=0.5, micro_batches=4, lr=1e-2)
    before = {name: value.clone() for name, value in module.teacher.network.named_parameters()}
    run_steps(module, [masked_batch(module, 4, 0)])
    student = dict(module.student.named_parameters())
    for name, value in module.teacher.network.named_parameters():
        assert_close(value, 0.5 * before[name] + 0.5 * student[name])


@pytest.mark.parametrize("shares", [[], ["patches"], ["patches", "positions"]])
def test_what_a_teacher_shares_is_the_students_and_the_rest_an_average(shares):
    module = tiny(learned_positions, momentum=0.9, teacher_shares=shares, lr=1e-2)
    run_steps(module, [masked_batch(module, 4, seed) for seed in range(2)])
    student = dict(module.student.backbone.model.named_parameters())
    same = {
        name
        for name, value in module.teacher.network.backbone.model.named_parameters()
        if torch.equal(value, student[name])
    }
    expected = {"patch_embed.proj.weight", "patch_embed.proj.bias"} if "patches" in shares else set()
    assert same == expected | ({"pos_embed"} if "positions" in shares else set())


def test_a_logged_step_says_how_far_targets_and_predictions_deviate():
    module = tiny()
    optimizers = start(module)
    batch = masked_batch(module, 4, 0)
    with torch.no_grad():
        features = module.targets(batch).features
        predicted = module.student(batch.views["global"], batch.masks["global"].visible).patches[0]
    report = module.take_step(batch, optimizers, measure=True)
    assert report.measures == pytest.approx(
        {
            "target_std": float(features.flatten(0, 2).std(0).mean()),
            "prediction_std": float(predicted.flatten(0, 1).std(0).mean()),
        },
        rel=1e-5,
    )
    assert module.diagnostics(report) == {
        "train/teacher/target_std": report.measures["target_std"],
        "train/student/prediction_std": report.measures["prediction_std"],
    }
    assert module.take_step(batch, optimizers).measures == {}
    sliced = tiny(micro_batches=2)
    found = sliced.take_step(batch, start(sliced), measure=True).measures
    halves = [float(part.flatten(0, 1).std(0).mean()) for part in predicted.chunk(2)]
    assert found["prediction_std"] == pytest.approx(sum(halves) / 2, rel=1e-5), "the mean over slices"
    alike = Batch(views={"global": torch.zeros(1, 4, 3, 32, 32)}, index=torch.arange(4), total=4, masks=batch.masks)
    fixed = tiny(partial(learned_positions, arguments={"pos_embed": "none"}))
    flat = fixed.take_step(alike, start(fixed), measure=True).measures
    assert flat["target_std"] < 1e-3, "without positions every blank patch is the same"


def test_compiled_blocks_have_targets_and_their_average_moves():
    """Published code that matched an average by name under compilers' prefixes left it where it began."""
    module, plain = tiny(momentum=0.5, lr=1e-2), tiny(momentum=0.5, lr=1e-2)
    for network in (module.student, module.teacher.network):
        for block in network.backbone.blocks:
            block.compile(backend="eager")
    batches = [masked_batch(module, 4, 0)]
    assert run_steps(module, batches)[0] == pytest.approx(run_steps(plain, batches)[0], rel=1e-4)
    compiled = dict(module.teacher.network.named_parameters())
    for name, value in plain.teacher.network.named_parameters():
        assert_close(compiled[name], value, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"masks": BlockMasks()}, "Use RandomMasks"),
        ({"num_masks": 0}, "Use 1 or more"),
        ({"top_blocks": 4}, "4 of 3 blocks.*Use 1 to 3"),
        ({"cls_rule": "median"}, "mean, sum"),
        ({"teacher_shares": ["blocks"]}, "patches, positions"),
        ({"decoder_groups": 5}, "groups that divide"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        tiny(**settings)


def test_networks_that_cannot_do_it_are_refused():
    with pytest.raises(UserError, match="visible"):
        Data2Vec2(ConvNet("resnet18"), views=CropViews(size=32))
    rotary = partial(ViT, "vit_small_patch16_dinov3", arguments={"embed_dim": 32, "depth": 2, "num_heads": 2})
    with pytest.raises(UserError, match=r"no parameters 'backbone\.model\.pos_embed"):
        tiny(rotary, teacher_shares=["positions"])
