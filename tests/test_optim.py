import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.optim import LARS, Clip, parameter_groups, resolve_lr
from ssd.patch_heads import PatchBranch
from ssd.schedules import Cosine


def clipped(clip, gradients, modules):
    gradients = [g.clone() for g in gradients]
    clip.apply(gradients, torch.stack([g.norm() for g in gradients]), modules)
    return gradients


def test_clipping_ranges():
    """Norms 5, 12, 1 clipped at 3, by tensor, by module {5, 12}, {1}, and all together."""
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([12.0]), torch.tensor([0.6, 0.8])]
    modules = ["backbone", "backbone", "head"]
    by_tensor = clipped(Clip(3.0, over="tensor"), gradients, modules)
    assert_close(torch.stack([g.norm() for g in by_tensor]), torch.tensor([3.0, 3.0, 1.0]), atol=1e-5, rtol=0)
    by_module = clipped(Clip(3.0, over="module"), gradients, modules)
    assert_close(torch.cat(by_module[:2]).norm(), torch.tensor(3.0), atol=1e-5, rtol=0)
    assert_close(by_module[2], gradients[2])
    together = clipped(Clip(3.0, over="all"), gradients, modules)
    reference = [nn.Parameter(g.clone()) for g in gradients]
    for parameter, gradient in zip(reference, gradients):
        parameter.grad = gradient.clone()
    nn.utils.clip_grad_norm_(reference, 3.0)
    for ours, parameter in zip(together, reference):
        assert_close(ours, parameter.grad)


class OneHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.last_layer = nn.Linear(8, 8, bias=False)


def scales_of(network, **settings):
    names = {id(p): name for name, p in network.named_parameters()}
    groups = parameter_groups(network, "bias_norm_and_scale", **settings)
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}, groups


@pytest.mark.parametrize(
    "depth, decay, embeddings, patch_embed",
    [(12, 0.9, 0.2542, 0.0508), (24, 0.9, 0.0718, 0.01436), (40, 0.98, 0.4368, 0.0874)],
)
def test_layer_decay_has_the_published_factors(depth, decay, embeddings, patch_embed):
    arguments = {"embed_dim": 8, "depth": depth, "num_heads": 2, "init_values": 1e-5, "reg_tokens": 2}
    network = PatchBranch(ViT("vit_tiny_patch16_224", img_size=32, arguments=arguments), OneHead())
    scales, groups = scales_of(network, layer_decay=decay, patch_embed_lr_scale=0.2)
    for name in ("cls_token", "pos_embed", "reg_token"):
        assert scales[f"backbone.model.{name}"] == pytest.approx(embeddings, abs=1e-4)
    assert scales["mask_token"] == pytest.approx(embeddings, abs=1e-4)
    assert scales["backbone.model.patch_embed.proj.weight"] == pytest.approx(patch_embed, abs=1e-4)
    assert scales["backbone.model.blocks.0.attn.qkv.weight"] == pytest.approx(decay**depth)
    assert scales[f"backbone.model.blocks.{depth - 1}.ls2.gamma"] == pytest.approx(decay)
    assert scales["backbone.model.norm.weight"] == scales["head.linear.weight"] == scales["head.last_layer.weight"] == 1
    assert [len(group["params"]) for group in groups if group["last_layer"]] == [1]


def test_layer_decay_counts_the_stages_of_a_convnet():
    convnet = ConvNet("resnet18", arguments={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_width": 8})
    scales, _ = scales_of(convnet, layer_decay=0.5)
    assert scales["model.conv1.weight"] == 0.5**5
    assert scales["model.layer1.0.conv1.weight"] == 0.5**4 and scales["model.layer4.0.conv1.weight"] == 0.5
    with pytest.raises(UserError, match=r"patch_embed_lr_scale: 0.2 finds no patch embedding"):
        parameter_groups(convnet, "bias_and_1d", patch_embed_lr_scale=0.2)


def test_published_decay_rules():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
            self.norm = nn.LayerNorm(8)
            self.linear = nn.Linear(8, 8)
            self.gamma = nn.Parameter(torch.ones(2, 8))
            self.weight_g = nn.Parameter(torch.ones(16, 1))
            self.held = nn.Parameter(torch.ones(1), requires_grad=False)

    network = Network()
    names = {id(p): name for name, p in network.named_parameters()}

    def decayed(rule):
        groups = parameter_groups(network, rule)
        assert sum(len(group["params"]) for group in groups) == 8
        return {names[id(p)] for group in groups if group["decays"] for p in group["params"]}

    assert decayed("bias_and_1d") == {"pos_embed", "cls_token", "linear.weight", "gamma", "weight_g"}
    assert decayed("bias_norm_and_scale") == {"pos_embed", "cls_token", "linear.weight", "weight_g"}
    groups = parameter_groups(network, "bias_and_norms_by_a_tenth")
    shares = {names[id(p)]: group["decays"] for group in groups for p in group["params"]}
    assert shares.pop("norm.weight") == 0.1
    assert {name for name, share in shares.items() if not share} == {"norm.bias", "linear.bias"}
    assert all(share in (0, 1) for share in shares.values())
    assert [group["decays"] for group in parameter_groups(network, "none")] == [1]
    with pytest.raises(UserError, match="decay_rule"):
        parameter_groups(network, "none of these")


def test_learning_rate_follows_the_batch():
    assert resolve_lr(5e-4, "linear", 256, 1024) == pytest.approx(2e-3)
    assert resolve_lr(4e-3, "sqrt", 1024, 2048) == pytest.approx(0.0056569, abs=1e-7)
    assert resolve_lr(5e-4, "none", 256, 1024) == 5e-4
    assert resolve_lr(Cosine(1.0, 0.1), "linear", 256, 512) == Cosine(2.0, 0.1)


def test_lars_by_hand():
    """w = (3, 4), g = (0, 1), wd .1, c .5: update (.3, 1.4), local rate .5 * 5 / |(.3, 1.4)|; a bias moves plainly."""
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS(momentum=0.9, trust_coefficient=0.5).build([{"params": [weight, bias]}])
    optimizer.param_groups[0].update(lr=0.1, weight_decay=0.1)
    for _ in range(2):
        weight.grad, bias.grad = torch.tensor([[0.0, 1.0]]), torch.tensor([2.0])
        before = weight.detach().clone()
        optimizer.step()
    assert_close(bias.detach(), torch.tensor([1.0 - 0.1 * 2 - 0.1 * (0.9 * 2 + 2)]))

    expected, momentum = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    for _ in range(2):
        update = torch.tensor([[0.0, 1.0]]) + 0.1 * expected
        momentum = 0.9 * momentum + update * 0.5 * expected.norm() / update.norm()
        last, expected = expected, expected - 0.1 * momentum
    assert_close(weight.detach(), expected)
    assert_close(before, last)
