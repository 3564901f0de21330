import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_modules.dinov2 import DINOv2
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.masking.recipes import BlockMasks, RandomMasks
from ssd.optim import Clip
from ssd.schedules import Cosine, Linear
from ssd.views.recipes import DINOViews
from tests.contract import MethodContract, flat_state, start
from tests.lightning_modules.masked import drawn, masks_of, random_batch, sameness, sinkhorn, terms

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "init_values": 0.1, "reg_tokens": 2}
HEAD = {"head_hidden_dim": 16, "head_bottleneck_dim": 8, "patch_head_bottleneck_dim": 6}
VIEWS = DINOViews(global_size=32, local_size=16, local_count=2)


def tiny(**settings) -> DINOv2:
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=32, arguments=VIT)
    return DINOv2(backbone, **({"views": VIEWS, "num_prototypes": 32, "koleo_group": 2, **HEAD} | settings))


def begun(**settings) -> DINOv2:
    module = tiny(**settings).train()
    module.begin(4, 2)
    return module


class TestContract(MethodContract):
    settings: dict = {}

    def make(self, **engine):
        # published rates are for long runs; a step of 1e-4 keeps Adam's sign noise below the tolerance
        return tiny(**{"lr": 1e-4, "lr_rule": "none"} | self.settings | engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


class TestContractOfSinkhornAndOwnHeads(TestContract):
    settings = {"target_rule": "sinkhorn", "shared_head": False, "num_patch_prototypes": 24}


# ---------------------------------------------------------------- against the paper, restated


class PlainHead(nn.Module):
    def __init__(self, bottleneck, prototypes):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, bottleneck))
        self.last_v = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.last_g = nn.Parameter(torch.ones(prototypes, 1))

    def forward(self, x):
        x = self.mlp(x)
        x = x / x.norm(dim=-1, keepdim=True)
        return x @ (self.last_g * self.last_v / self.last_v.norm(dim=1, keepdim=True)).T

    def copy_from(self, head):
        self.mlp.load_state_dict(head.mlp.state_dict())
        self.last_v.data.copy_(head.last_layer.weight_v)
        self.last_g.data.copy_(head.last_layer.weight_g)


class PlainNetwork(nn.Module):
    """Masked embeddings replaced before positions are added, every patch through the head of patches."""

    def __init__(self, shared, token):
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, dynamic_img_size=True, **VIT)
        self.head = PlainHead(8, 32)
        self.patch_head = self.head if shared else PlainHead(6, 24)
        if token:
            self.token = nn.Parameter(torch.zeros(1, 24))

    def forward(self, x, masked=None):
        """(B, 3, H, W), bool (B, N) -> class tokens (B, D), (B, K), (B, N, K)"""
        x = self.vit.patch_embed(x)
        if masked is not None:
            x = torch.where(masked.view(*x.shape[:3], 1), self.token, x)
        x = self.vit._pos_embed(x)
        for block in self.vit.blocks:
            x = block(x)
        x = self.vit.norm(x)
        return x[:, 0], self.head(x[:, 0]), self.patch_head(x[:, 3:])

    def copy_from(self, branch):
        self.vit.load_state_dict(branch.backbone.model.state_dict())
        if branch.patch_head is None:
            self.head.copy_from(branch.head.head)
        else:
            self.head.copy_from(branch.head)
            self.patch_head.copy_from(branch.patch_head)
        if hasattr(self, "token"):
            self.token.data.copy_(branch.mask_token)
        return self


def depth_of(name):
    """0 embeddings, then blocks, then the final norm; None for heads."""
    if name.startswith("vit.blocks."):
        return int(name.split(".")[2]) + 1
    if name.startswith("vit.norm"):
        return 3
    return 0 if name.startswith("vit.") or name == "token" else None


@pytest.mark.parametrize("shared, rule", [(True, "centering"), (False, "sinkhorn")])
def test_twenty_steps_equal_the_equations_of_the_paper_written_out(shared, rule):
    """Losses, targets and masks as the paper has them, with loops over crops, pairs and neighbours."""
    steps, per_epoch, samples = 20, 5, 8
    base_lr, min_lr, warmup = 2e-3, 1e-6, 4
    module = tiny(
        shared_head=shared,
        num_patch_prototypes=None if shared else 24,
        target_rule=rule,
        koleo_group=4,
        lr=Cosine(base_lr, min_lr, warmup="4 steps"),
        lr_reference_batch=32,
        teacher_temperature=Linear(0.04, 0.07, until=0.5),
        momentum=Cosine(0.9, 1.0),
        clip=Clip(0.5, over="module"),
    )
    module.begin(steps, per_epoch)
    module.train()
    optimizers = module.build_optimizers()

    student = PlainNetwork(shared, token=True).copy_from(module.student)
    teacher = PlainNetwork(shared, token=False).copy_from(module.student)
    center, patch_center = torch.zeros(32), torch.zeros(32)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in student.named_parameters()}
    peak = base_lr * math.sqrt(samples / 32)

    for i in range(steps):
        batch = drawn(module, samples, 100 + i)
        report = module.take_step(batch, optimizers)

        temperature = 0.04 + 0.03 * min(i / 9, 1.0)
        masked = batch.masks["global"].boolean
        with torch.no_grad():
            _, teacher_cls, teacher_patches = zip(*(teacher(view) for view in batch.views["global"]))
            seen = [teacher_patches[v][masked[v]] for v in range(2)]
            if rule == "centering":
                cls_targets = [torch.softmax((t - center) / temperature, -1) for t in teacher_cls]
                patch_targets = [torch.softmax((t - patch_center) / temperature, -1) for t in seen]
                center = 0.9 * center + 0.1 * torch.cat(teacher_cls).mean(0)
                patch_center = 0.9 * patch_center + 0.1 * torch.cat(seen).mean(0)
            else:
                cls_targets = sinkhorn(torch.cat(teacher_cls), temperature).chunk(2)
                patch_targets = sinkhorn(torch.cat(seen), temperature).split([len(rows) for rows in seen])
        globals_ = [student(view, masked[v]) for v, view in enumerate(batch.views["global"])]
        student_cls = [cls for _, cls, _ in globals_] + [student(view)[1] for view in batch.views["local"]]
        dino = 0
        for q_index, q in enumerate(cls_targets):
            for v_index, s in enumerate(student_cls):
                if v_index != q_index:
                    dino = dino + (-q * F.log_softmax(s / 0.1, dim=-1)).sum(-1).mean() / (2 + 2 * 2)
        ibot, spread = 0, 0
        for v in range(2):
            cost = (-patch_targets[v] * F.log_softmax(globals_[v][2][masked[v]] / 0.1, dim=-1)).sum(-1)
            for crop in cost.split(masked[v].sum(1).tolist()):
                ibot = ibot + (crop.mean() if len(crop) else 0) / (2 * samples)
            features = globals_[v][0] / globals_[v][0].norm(dim=-1, keepdim=True)
            for b in range(samples):
                others = [j for j in range(b // 4 * 4, b // 4 * 4 + 4) if j != b]
                nearest = max(others, key=lambda j: float((features[b] @ features[j]).detach()))
                spread = spread - torch.log((features[b] - features[nearest] + 1e-8).norm() + 1e-8) / samples
        loss = dino + ibot + 0.1 * spread
        parameters = dict(student.named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))

        if i < warmup:
            lr = peak * i / (warmup - 1)
        else:
            lr = min_lr + 0.5 * (peak - min_lr) * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup)))
        decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * i / steps))
        momentum = 1 - (1 - 0.9) * 0.5 * (1 + math.cos(math.pi * i / steps))
        parts = {name: "vit" if depth_of(name) is not None else name.partition(".")[0] for name in parameters}
        norms = {
            part: math.sqrt(sum(float(gradients[n].square().sum()) for n in parts if parts[n] == part))
            for part in set(parts.values())
        }
        with torch.no_grad():
            for name, p in parameters.items():
                g = gradients[name] * min(1.0, 0.5 / (norms[parts[name]] + 1e-6))
                first, second = moments[name]
                first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
                moments[name] = first, second
                rate = lr if depth_of(name) is None else lr * 0.9 ** (3 - depth_of(name))
                rate *= 0.2 if "patch_embed" in name else 1
                # the prototypes stand still in epoch 0 while their moments gather
                rate *= 0 if "last_" in name and i < per_epoch else 1
                if not (name.endswith(".bias") or "norm" in name or "gamma" in name):
                    p.mul_(1 - rate * decay)
                moved = (first / (1 - 0.9 ** (i + 1))) / ((second / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
                p.sub_(rate * moved)
            for name, t in teacher.named_parameters():
                t.mul_(momentum).add_(parameters[name], alpha=1 - momentum)
        for name, value in (("dino", dino), ("ibot", ibot), ("koleo", spread)):
            assert report.terms[name] == pytest.approx(float(value.detach()), abs=1e-5), f"{name} in step {i}"

    if rule == "centering":
        assert_close(module.center.center, center, atol=1e-5, rtol=0)
        assert_close(module.patch_center.center, patch_center, atol=1e-5, rtol=0)
    for plain, ours, token in ((student, module.student, True), (teacher, module.teacher.network, False)):
        theirs = PlainNetwork(shared, token).copy_from(ours)
        for (name, a), b in zip(plain.named_parameters(), theirs.parameters()):
            # key biases of attention have no gradient but rounding, which Adam scales up to whole steps
            if not name.endswith("qkv.bias"):
                assert_close(b, a, atol=3e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------- the losses in closed form


def test_uniform_networks_pay_log_k_and_its_half_where_half_of_the_crops_are_masked():
    module = begun(shared_head=False)
    for network in (module.student, module.teacher.network):
        for head in (network.head, network.patch_head):
            head.last_layer.weight_v.data[:] = 1.0
    found = terms(module, drawn(module, 8, 0))
    assert float(found["dino"]) == pytest.approx(math.log(32), abs=1e-4)
    assert float(found["ibot"]) == pytest.approx(math.log(32) / 2, abs=1e-4)


def test_swapping_the_global_views_changes_nothing():
    module = begun()
    masks = masks_of(5, 0, 16, 1)
    batch, swapped = random_batch(4, 0, masks), random_batch(4, 0, masks)
    swapped.views["global"] = swapped.views["global"].flip(0)
    first, second = terms(module, batch), terms(module, swapped)
    assert all(float(first[name]) == pytest.approx(float(second[name]), abs=1e-5) for name in first)


def test_koleo_looks_at_the_masked_students_class_tokens_summed_over_the_views():
    module = begun()
    batch = random_batch(4, 0, masks_of(5, 5, 5, 5))
    with torch.no_grad():
        module.student.mask_token.normal_(0, 5)
        hidden = module.student.backbone(
            batch.views["global"].flatten(0, 1),
            masked=batch.masks["global"].boolean.flatten(0, 1),
            mask_token=module.student.mask_token,
        )
    unit = F.normalize(hidden.cls, dim=-1).view(2, 2, 2, 24)  # (V, groups, pair, D)
    apart = (unit[:, :, 0] - unit[:, :, 1]).norm(dim=-1)
    assert float(terms(module, batch)["koleo"]) == pytest.approx(float(-2 * apart.log().sum() / 4), abs=1e-4)


def test_without_any_mask_the_patches_cost_nothing_and_nothing_is_nan():
    for rule in ("centering", "sinkhorn"):
        module = begun(target_rule=rule)
        report = module.take_step(random_batch(4, 0, masks_of(0, 0, 0, 0)), module.build_optimizers(), measure=True)
        assert report.terms["ibot"] == 0 and not report.not_finite
        assert all(value.isfinite().all() for value in flat_state(module).values())


def test_equal_pictures_do_not_make_a_step_infinite():
    module = begun()
    batch = random_batch(4, 0, masks_of(0, 0, 0, 0))
    batch.views["global"] = batch.views["global"][:, :1].expand(-1, 4, -1, -1, -1).clone()
    report = module.take_step(batch, module.build_optimizers())
    assert report.terms["koleo"] > 20 and not report.not_finite


def test_local_views_are_not_needed():
    module = begun(views=DINOViews(global_size=32, local_count=0))
    batch = random_batch(4, 0, masks_of(5, 0, 3, 1))
    del batch.views["local"]
    for network in (module.student, module.teacher.network):
        network.head.head.last_layer.weight_v.data[:] = 1.0
    assert float(terms(module, batch)["dino"]) == pytest.approx(math.log(32), abs=1e-4)


# ---------------------------------------------------------------- heads, masks, time


@pytest.mark.parametrize("shared", [True, False])
def test_the_teacher_has_all_heads_and_no_mask_token(shared):
    module = begun(shared_head=shared, momentum=0.5)
    mine, theirs = dict(module.teacher.network.named_parameters()), dict(module.student.named_parameters())
    assert set(theirs) - set(mine) == {"mask_token"} and not set(mine) - set(theirs)
    assert sum("last_layer" in name for name in mine) == (2 if shared else 4)


def test_frozen_prototypes_gather_moments_at_rate_zero():
    module = tiny(freeze_last_layer="1 epochs", lr=1e-3)
    optimizers = start(module)
    layer = module.student.head.head.last_layer.weight_v
    before = layer.detach().clone()
    for step in range(2):
        module.take_step(drawn(module, 4, step), optimizers)
        assert torch.equal(layer, before) and optimizers[0].state[layer]["exp_avg"].any()
    module.take_step(drawn(module, 4, 2), optimizers)
    assert not torch.equal(layer, before)


def test_masks_are_the_published_blocks_on_the_backbones_grid():
    plan = tiny(micro_batches=2).mask_plans()["global"]
    assert (plan.views, plan.grid, plan.slices) == (2, (4, 4), 2)
    assert plan.recipe == BlockMasks(ratio=(0.1, 0.5), share=0.5, smallest=4, largest=0.5, even=True)


def test_published_peak_of_the_learning_rate():
    module = tiny()
    optimizers = start(module)
    module._write_rates(module.optimized()[0], optimizers[0], 2048)
    module.step, module.total_steps = 1, 20  # the last of two steps of warm-up
    module._write_rates(module.optimized()[0], optimizers[0], 2048)
    assert max(group["lr"] for group in optimizers[0].param_groups) == pytest.approx(0.0056569, abs=1e-6)


# ---------------------------------------------------------------- settings


def test_a_convnet_is_refused_with_one_message():
    convnet = ConvNet("resnet18", arguments={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_width": 8})
    with pytest.raises(UserError, match=r"DINOv2 needs a backbone that can replace patches.*Use a ViT"):
        DINOv2(convnet, views=VIEWS, num_prototypes=32, **HEAD)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_prototypes": 0}, "num_prototypes: 0"),
        ({"target_rule": "guess"}, "target_rule: 'guess'"),
        ({"koleo_group": 1}, "koleo_group: 1 samples have no neighbours"),
        ({"num_patch_prototypes": 8}, "num_patch_prototypes is for patches with a head of their own"),
        ({"masks": RandomMasks()}, "RandomMasks masks every crop by the same count"),
        ({"views": "plain"}, "at least 2 'global' views"),
        ({"layer_decay": 0.0}, r"layer_decay: 0\.0"),
        ({"freeze_by": "will"}, "freeze_by: 'will'"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_built(settings, message):
    with pytest.raises(UserError, match=message):
        tiny(**settings)


def test_groups_that_slices_would_cut_are_refused():
    module = begun(koleo_group=4, micro_batches=4)
    with pytest.raises(UserError, match="koleo_group: 4 does not fit the 2 samples of a slice"):
        module.take_step(drawn(module, 8, 0), module.build_optimizers())
    off = begun(koleo_group=4, micro_batches=4, koleo_weight=0.0)
    assert set(off.take_step(drawn(off, 8, 0), off.build_optimizers()).terms) == {"dino", "ibot"}


def test_batch_normalisation_in_the_heads_tells_pictures_apart_before_the_first_step():
    assert sameness(tiny()) > 0.9, "without it all answers are nearly one"
    assert sameness(tiny(head_batch_norm=True)) < 0.4, "with it they are not, whatever the patches are"
