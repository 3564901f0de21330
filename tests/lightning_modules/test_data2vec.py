import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_modules.data2vec import Data2Vec
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.errors import UserError
from ssd.masking.recipes import BlockMasks, RandomMasks
from ssd.views.recipes import RECIPES, CropViews
from tests.contract import MethodContract, run_steps, start
from tests.lightning_modules.test_mae import random_batch

VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "init_values": 1e-4}


def tiny(arguments=(), **settings) -> Data2Vec:
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=32, arguments=VIT | dict(arguments))
    defaults = {"views": CropViews(size=32), "top_blocks": 2, "lr": 1e-4, "lr_rule": "none"}
    masks = BlockMasks(ratio=(0.62, 0.62), share=1.0, smallest=2)
    return Data2Vec(backbone, **{"masks": masks, **defaults} | settings)


def masked_batch(module: Data2Vec, samples: int, seed: int) -> Batch:
    batch = random_batch(samples, seed)
    batch.masks["global"] = module.mask_plans()["global"].draw(samples, 0, seed)
    return batch


class TestContract(MethodContract):
    """Samples hide different numbers of patches, which the mean over the whole step counts."""

    def make(self, **engine):
        return tiny(**{"momentum": 0.9, "teacher_shares": ["positions"]} | engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


def loss_of(module: Data2Vec, batch: Batch) -> Tensor:
    with torch.no_grad():
        return module.losses(batch, module.targets(batch))["features"]


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


def block_ends(model, sequence: Tensor) -> list[Tensor]:
    """Of timm's own blocks, written out: normalised in front, scaled, added."""
    ends = []
    for block in model.blocks:
        sequence = sequence + block.ls1.gamma * block.attn(block.norm1(sequence))
        sequence = sequence + block.ls2.gamma * block.mlp(block.norm2(sequence))
        ends.append(sequence)
    return ends


def restated(module: Data2Vec, batch: Batch) -> Tensor:
    """Picture by picture and token by token."""
    student, teacher = module.student, module.teacher.network.backbone.model
    total, count = torch.zeros(()), 0
    for picture, hidden in zip(batch.views["global"][0], batch.masks["global"].boolean[0]):
        ends = block_ends(teacher, teacher._pos_embed(teacher.patch_embed(picture[None])))[-2:]
        target = layer_norm((layer_norm(ends[0][0, 1:]) + layer_norm(ends[1][0, 1:])) / 2)
        model = student.backbone.model
        tokens = model.patch_embed(picture[None])[0].flatten(0, 1).clone()
        for place in range(16):
            if hidden[place]:
                tokens[place] = student.mask_token[0]
        sequence = torch.cat([model.cls_token[0], tokens])[None] + model.pos_embed
        out = model.norm(block_ends(model, sequence)[-1])[0, 1:]
        predicted = out @ student.head.weight.T + student.head.bias
        for place in range(16):
            if hidden[place]:
                error = (predicted[place] - target[place]).abs()
                total = total + torch.where(error < 2, error**2 / 4, error - 1).mean()
                count += 1
    return total / count


def test_the_loss_is_that_of_the_paper_written_out():
    module = tiny(momentum=0.9)
    run_steps(module, [masked_batch(module, 4, 0)])
    batch = masked_batch(module, 3, 1)
    batch.masks["global"].boolean[0, 0, :8] = False  # samples hide different numbers
    with torch.no_grad():
        assert_close(loss_of(module, batch), restated(module, batch), atol=1e-5, rtol=1e-4)


def test_the_teacher_sees_every_patch_once_a_step_and_targets_do_not_know_what_is_hidden():
    module = tiny()
    calls = []
    hook = lambda network, arguments, settings, answer: calls.append(settings.get("masked"))
    module.teacher.network.backbone.register_forward_hook(hook, with_kwargs=True)
    batch, other = masked_batch(module, 4, 0), masked_batch(module, 4, 1)
    other.views = batch.views
    assert torch.equal(module.targets(batch).features, module.targets(other).features)
    assert calls == [None, None]
    run_steps(module, [batch])
    assert len(calls) == 3


def test_hidden_pixels_reach_the_target_and_not_the_student():
    module = tiny().eval()
    batch = masked_batch(module, 2, 0)
    hidden = batch.masks["global"].boolean
    with torch.no_grad():
        before, target = module.student(batch.views["global"], hidden), module.targets(batch).features
    pixels = hidden[0, 0].unflatten(0, (4, 4)).repeat_interleave(8, 0).repeat_interleave(8, 1)
    batch.views["global"][0, 0][:, pixels] = 3.0
    with torch.no_grad():
        assert torch.equal(module.student(batch.views["global"], hidden), before)
        assert (module.targets(batch).features[0, 0] != target[0, 0]).any()


class Says(torch.nn.Module):
    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, pictures, masked):
        return self.answer


def test_hidden_patches_alone_cost_a_quarter_for_an_error_of_one_and_two_for_three():
    module = tiny()
    batch = masked_batch(module, 2, 0)
    targets, hidden = module.targets(batch), batch.masks["global"].boolean[..., None]
    for error, cost in ((1.0, 0.25), (3.0, 2.0), (0.0, 0.0)):
        module.student = Says(targets.features + torch.where(hidden, error, 50.0))
        assert_close(module.losses(batch, targets)["features"], torch.tensor(cost), atol=1e-5, rtol=1e-5)


def test_layers_are_normalised_before_they_are_averaged():
    """A residual stream has a few channels that are huge: a plain mean over layers would show the last of them alone."""
    module = tiny()
    batch = masked_batch(module, 2, 0)
    teacher = module.teacher.network.backbone
    with torch.no_grad():
        before = [layer_norm(tap[:, 1:]) for tap in teacher(batch.views["global"][0], taps=(2, 3)).taps.values()]
        teacher.model.blocks[2].ls2.gamma.fill_(1.0)
        teacher.model.blocks[2].mlp.fc2.bias[5] = 1e4
        found = module.targets(batch).features[0]
        taps = teacher(batch.views["global"][0], taps=(2, 3)).taps
    spike = layer_norm(taps["block3"][:, 1:])
    assert spike[..., 5].min() > 5
    assert_close(found, layer_norm((before[0] + spike) / 2), atol=1e-4, rtol=1e-4)
    plain = layer_norm((taps["block2"] + taps["block3"])[:, 1:] / 2)
    assert alike(found, before[0]) > 0.2 > alike(plain, before[0])


def alike(one: Tensor, other: Tensor) -> float:
    """Mean cosine over the channels behind the spike."""
    return float(torch.nn.functional.cosine_similarity(one[..., 6:], other[..., 6:], dim=-1).mean())


def test_student_and_teacher_begin_alike_and_neither_token_nor_head_is_averaged():
    module = tiny()
    student, teacher = module.student.state_dict(), module.teacher.network.state_dict()
    assert set(student) - set(teacher) == {"mask_token", "head.weight", "head.bias"}
    assert all(torch.equal(student[name], value) for name, value in teacher.items())


def test_the_teacher_keeps_its_share_of_the_old_once_a_step():
    module = tiny(momentum=0.75, micro_batches=2, lr=1e-2)
    before = {name: value.clone() for name, value in module.teacher.network.named_parameters()}
    run_steps(module, [masked_batch(module, 4, 0)])
    student = dict(module.student.named_parameters())
    for name, value in module.teacher.network.named_parameters():
        assert_close(value, 0.75 * before[name] + 0.25 * student[name])
    assert not module.teacher.network.training


def test_published_masks_hide_at_most_120_of_196_patches_in_blocks():
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", arguments={"embed_dim": 32, "depth": 1, "num_heads": 2})
    drawn = Data2Vec(backbone, top_blocks=1).mask_plans()["global"].draw(256, 0, 0)
    hidden = drawn.boolean.sum(-1)
    assert hidden.max() == 120 and hidden.float().mean() > 117 and hidden.min() > 90
    assert RECIPES["data2vec"].scale == (0.08, 1.0)


def test_a_logged_step_says_how_far_targets_and_predictions_deviate():
    module = tiny()
    batch = masked_batch(module, 4, 0)
    with torch.no_grad():
        target, predicted = (
            module.targets(batch).features,
            module.student(batch.views["global"], batch.masks["global"].boolean),
        )
    report = module.take_step(batch, start(module), measure=True)
    found = module.diagnostics(report)
    assert found["train/teacher/target_std"] == pytest.approx(float(target.flatten(0, 2).std(0).mean()), rel=1e-5)
    assert found["train/student/prediction_std"] == pytest.approx(
        float(predicted.flatten(0, 2).std(0).mean()), rel=1e-5
    )


@pytest.mark.parametrize("masks", [RandomMasks(0.5), BlockMasks(ratio=(0.3, 0.8), share=0.5)])
def test_masks_of_any_kind_are_learned_from(masks):
    module = tiny(masks=masks)
    assert run_steps(module, [masked_batch(module, 4, 0)])[0]["features"] > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_blocks": 0}, "0 of 3 blocks.*Use 1 to 3"),
        ({"beta": 0.0}, "above 0"),
        ({"teacher_shares": ["head"]}, "patches, positions"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        tiny(**settings)


def test_a_network_that_cannot_see_mask_tokens_is_refused():
    with pytest.raises(UserError, match="replace patches"):
        Data2Vec(ConvNet("resnet18"), views=CropViews(size=32))
