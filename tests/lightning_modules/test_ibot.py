import math
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import lightning_modules.ibot
from lightning_modules.ibot import IBOT
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.masking.recipes import BlockMasks, RandomMasks
from ssd.masking.scattered import ScatteredMasks
from ssd.optim import Clip
from ssd.schedules import Cosine, Linear
from ssd.views.recipes import DINOViews
from tests.contract import MethodContract, flat_state, start
from tests.lightning_modules.masked import TOKENS, drawn, masks_of, random_batch, sameness, terms

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
HEAD = {"head_hidden_dim": 16, "head_bottleneck_dim": 8}
VIEWS = DINOViews(global_size=32, local_size=16, local_count=2)


def tiny(**settings) -> IBOT:
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=32, arguments=VIT)
    return IBOT(backbone, **({"views": VIEWS, "num_prototypes": 32, **HEAD} | settings))


def begun(**settings) -> IBOT:
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


class TestContractOfOwnPrototypesAndCentresOverMaskedPatches(TestContract):
    settings = {"shared_head": False, "patch_center_over": "masked"}


class TestContractOfSinkhorn(TestContract):
    settings = {"target_rule": "sinkhorn"}


# ---------------------------------------------------------------- against the paper, restated


class PlainNetwork(nn.Module):
    """Masked embeddings replaced before positions are added; every patch through the head."""

    def __init__(self, shared, token):
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, dynamic_img_size=True, **VIT)
        self.mlp = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))
        self.last_v, self.last_g = nn.Parameter(torch.empty(32, 8)), nn.Parameter(torch.ones(32, 1))
        if not shared:
            self.last2_v, self.last2_g = nn.Parameter(torch.empty(32, 8)), nn.Parameter(torch.ones(32, 1))
        if token:
            self.token = nn.Parameter(torch.zeros(1, 24))
        self.shared = shared

    def forward(self, x, masked=None):
        """(B, 3, H, W), bool (B, N) -> (B, K), (B, N, K)"""
        x = self.vit.patch_embed(x)
        if masked is not None:
            x = torch.where(masked.view(*x.shape[:3], 1), self.token, x)
        x = self.vit._pos_embed(x)
        for block in self.vit.blocks:
            x = block(x)
        x = self.mlp(self.vit.norm(x))
        x = x / x.norm(dim=-1, keepdim=True)
        last = self.last_g * self.last_v / self.last_v.norm(dim=1, keepdim=True)
        last2 = last if self.shared else self.last2_g * self.last2_v / self.last2_v.norm(dim=1, keepdim=True)
        return x[:, 0] @ last.T, x[:, 1:] @ last2.T

    def copy_from(self, branch):
        self.vit.load_state_dict(branch.backbone.model.state_dict())
        self.mlp.load_state_dict(branch.head.head.mlp.state_dict())
        self.last_v.data.copy_(branch.head.head.last_layer.weight_v)
        self.last_g.data.copy_(branch.head.head.last_layer.weight_g)
        if not self.shared:
            self.last2_v.data.copy_(branch.head.patch_last_layer.weight_v)
            self.last2_g.data.copy_(branch.head.patch_last_layer.weight_g)
        if hasattr(self, "token"):
            self.token.data.copy_(branch.mask_token)
        return self


@pytest.mark.parametrize("shared", [True, False])
def test_ten_steps_equal_the_equations_of_the_paper_written_out(shared):
    """Sections 2 to 5 of the published recipe with plain loops over crops and pairs; masking starts in epoch 1."""
    steps, per_epoch, samples = 10, 3, 4
    base_lr, min_lr, warmup = 5e-4, 1e-6, 3
    module = tiny(
        shared_head=shared,
        mask_start="1 epochs",
        lr=Cosine(base_lr, min_lr, warmup="3 steps"),
        lr_reference_batch=16,
        teacher_temperature=Linear(0.04, 0.07, until="2 epochs", every="epoch"),
        patch_teacher_temperature=Linear(0.04, 0.07, until="2 epochs", every="epoch"),
        ibot_weight=2.0,
        momentum=Cosine(0.9, 1.0),
        clip=Clip(0.5, over="tensor"),
    )
    module.begin(steps, per_epoch)
    module.train()
    optimizers = module.build_optimizers()

    student = PlainNetwork(shared, token=True).copy_from(module.student)
    teacher = PlainNetwork(shared, token=False).copy_from(module.student)
    center, patch_center = torch.zeros(32), torch.zeros(32)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p), 0) for name, p in student.named_parameters()}
    peak = base_lr * samples / 16
    seen = set()

    for i in range(steps):
        batch = drawn(module, samples, 100 + i)
        report = module.take_step(batch, optimizers)

        epoch = i // per_epoch
        temperature, patch_temperature = [(0.04, 0.04), (0.07, 0.04), (0.07, 0.07), (0.07, 0.07)][epoch]
        masked = batch.masks["global"].boolean if epoch >= 1 else torch.zeros(2, samples, TOKENS, dtype=torch.bool)
        seen |= {int(count) for count in masked.sum(2).flatten()}
        with torch.no_grad():
            teacher_cls, teacher_patches = zip(*(teacher(view) for view in batch.views["global"]))
        globals_ = [student(view, masked[v]) for v, view in enumerate(batch.views["global"])]
        student_cls = [cls for cls, _ in globals_] + [student(view)[0] for view in batch.views["local"]]
        cls_loss, pairs, mim_loss = 0, 0, 0
        for q_index, t in enumerate(teacher_cls):
            q = torch.softmax((t - center) / temperature, dim=-1)
            for v_index, s in enumerate(student_cls):
                if v_index != q_index:
                    cls_loss = cls_loss + (-q * F.log_softmax(s / 0.1, dim=-1)).sum(-1).mean()
                    pairs += 1
        cls_loss = cls_loss / pairs
        for v in range(2):
            for b in range(samples):
                q = torch.softmax((teacher_patches[v][b] - patch_center) / patch_temperature, dim=-1)
                ce = (-q * F.log_softmax(globals_[v][1][b] / 0.1, dim=-1)).sum(-1)
                m = masked[v, b].float()
                mim_loss = mim_loss + (m * ce).sum() / m.sum().clamp(min=1) / samples / 2
        center = 0.9 * center + 0.1 * torch.cat(teacher_cls).mean(0)
        patch_center = 0.9 * patch_center + 0.1 * torch.cat(teacher_patches).mean(1).mean(0)
        loss = cls_loss + 2.0 * mim_loss
        found = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
        gradients = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(student.named_parameters(), found)}

        if i < warmup:
            lr = peak * i / (warmup - 1)
        else:
            lr = min_lr + 0.5 * (peak - min_lr) * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup)))
        decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * i / steps))
        momentum = 1 - (1 - 0.9) * 0.5 * (1 + math.cos(math.pi * i / steps))
        with torch.no_grad():
            for name, p in student.named_parameters():
                if epoch < 1 and name.startswith("last"):
                    continue
                g = gradients[name]
                g = g * min(1.0, 0.5 / (float(g.norm()) + 1e-6))
                first, second, count = moments[name]
                first, second, count = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g, count + 1
                moments[name] = first, second, count
                if not (name.endswith(".bias") or p.ndim == 1):
                    p.mul_(1 - lr * decay)
                p.sub_(lr * (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8))
            theirs = dict(student.named_parameters())
            for name, t in teacher.named_parameters():
                t.mul_(momentum).add_(theirs[name], alpha=1 - momentum)
        assert report.terms["dino"] == pytest.approx(float(cls_loss.detach()), abs=1e-5), f"step {i}"
        assert report.terms["ibot"] == pytest.approx(float(torch.as_tensor(mim_loss).detach()), abs=1e-5), f"step {i}"

    assert 0 in seen and len(seen) > 3, "crops without masks and with masks of different sizes were among them"
    assert_close(module.center.center, center, atol=1e-5, rtol=0)
    assert_close(module.patch_center.center, patch_center, atol=1e-5, rtol=0)
    for plain, ours, token in ((student, module.student, True), (teacher, module.teacher.network, False)):
        theirs = PlainNetwork(shared, token).copy_from(ours)
        for (name, a), b in zip(plain.named_parameters(), theirs.parameters()):
            # key biases of attention have no gradient but rounding, which Adam scales up to whole steps
            if not name.endswith("qkv.bias"):
                assert_close(b, a, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert module.student.mask_token.any()


# ---------------------------------------------------------------- the loss in closed form


def test_without_any_mask_the_patches_cost_nothing_and_nothing_is_nan():
    for settings in ({}, {"patch_center_over": "masked"}, {"target_rule": "sinkhorn"}):
        module = begun(**settings)
        batch = random_batch(4, 0, masks_of(0, 0, 0, 0))
        report = module.take_step(batch, module.build_optimizers(), measure=True)
        assert report.terms["ibot"] == 0 and not report.not_finite
        assert "train/teacher/patch_kl" not in module.diagnostics(report)
        assert all(value.isfinite().all() for value in flat_state(module).values())


@pytest.mark.parametrize("num_prototypes, uniform", [(32, math.log(32)), (8192, 9.0109)])
def test_uniform_networks_pay_log_k_and_log_k_times_the_share_of_masked_crops(num_prototypes, uniform):
    module = begun(num_prototypes=num_prototypes)
    for network in (module.student, module.teacher.network):
        network.head.head.last_layer.weight_v.data[:] = 1.0
    found = terms(module, random_batch(4, 0, masks_of(5, 0, 16, 1)))
    assert float(found["dino"]) == pytest.approx(uniform, abs=1e-4)
    assert float(found["ibot"]) == pytest.approx(uniform * 0.75, abs=1e-4)


@pytest.mark.parametrize(
    "counts, wanted",
    [((1, 10), (2 + 4) / 2), ((16, 16, 0, 0), 4 / 2), ((1, 0), 2 / 2), ((1, 16, 0, 3), (2 + 4 + 4) / 4)],
)
def test_each_masked_crop_counts_alike_and_one_without_masks_counts_as_a_crop(counts, wanted, monkeypatch):
    """A token costs 2 where it is the only one of its crop, else 4: not a mean over tokens."""
    module = begun()
    batch = random_batch(len(counts), 0, masks_of(*counts))
    costs = torch.where(batch.masks["global"].weight.flatten() == 1, 2.0, 4.0)
    monkeypatch.setattr(lightning_modules.ibot, "token_cross_entropy", lambda *_: costs)
    assert float(terms(module, batch)["ibot"]) == pytest.approx(wanted)


def test_targets_come_from_patches_the_student_cannot_see():
    """Pixels under masks change what the teacher says, and change nothing for the student."""
    module = begun()
    masks = masks_of(4, 0, 4, 4)  # the top row of patches
    with torch.no_grad():
        module.student.mask_token.normal_()
        before, after = random_batch(4, 0, masks), random_batch(4, 0, masks)
        after.views["global"][:, [0, 2, 3], :, :8] += torch.randn(2, 3, 3, 8, 32)
        old, new = module.targets(before), module.targets(after)
        real = old.patch_weight > 0
        assert ((new.patch_probs - old.patch_probs).abs().amax(1)[real] > 1e-4).all()
        for batch in (before, after):
            batch.seen = module.student(
                batch.views, masked={"global": masks.boolean}, places={"global": masks.flat_in_whole()}
            )
        assert torch.equal(before.seen.pictures.features, after.seen.pictures.features)
        assert torch.equal(before.seen.patches.features, after.seen.patches.features)
        # and where nothing is masked the student sees it all
        after.views["global"][:, 1] += 1
        moved = module.student(
            after.views, masked={"global": masks.boolean}, places={"global": masks.flat_in_whole()}
        ).pictures
        assert not torch.equal(moved.features[:2, 1], before.seen.pictures.features[:2, 1])


# ---------------------------------------------------------------- the head and the centres


@pytest.mark.parametrize("slices", [1, 2])
def test_the_head_sees_no_patch_that_is_not_masked(slices):
    module = begun(patch_center_over="masked", micro_batches=slices)
    batch = drawn(module, 8, 3)
    assert batch.masks["global"].boolean.any() and not batch.masks["global"].boolean.all()
    seen = {"student": [], "teacher": []}
    for name, network in (("student", module.student), ("teacher", module.teacher.network)):
        network.head.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[1].detach()))
    with torch.no_grad():
        targets = module.targets(batch)
        for number in range(slices):
            module.losses(batch.part(number, slices), targets.part(number, slices))

        masks, x = batch.masks["global"], batch.views["global"].flatten(0, 1)
        whole = module.teacher.network.backbone(x).patches.unflatten(0, (2, 8))
        wanted = [masks.part(number, slices).boolean for number in range(slices)]
        views = [whole[:, number * 8 // slices : (number + 1) * 8 // slices] for number in range(slices)]
        assert len(seen["teacher"]) == 1 and len(seen["student"]) == slices
        for teacher, weight, chosen, view in zip(seen["teacher"][0].chunk(slices), masks.weight, wanted, views):
            assert_close(teacher[weight > 0], view[chosen])
        token, hidden = module.student.mask_token, masks.boolean.flatten(0, 1)
        whole = module.student.backbone(x, masked=hidden, mask_token=token).patches.unflatten(0, (2, 8))
        views = [whole[:, number * 8 // slices : (number + 1) * 8 // slices] for number in range(slices)]
        for student, weight, chosen, view in zip(seen["student"], masks.weight, wanted, views):
            assert_close(student[weight > 0], view[chosen])


@pytest.mark.parametrize("over", ["all", "masked"])
def test_the_patches_centre_is_the_mean_over_all_of_them_or_over_masked_ones(over):
    module = begun(patch_center_over=over, patch_center_momentum=0.8)
    batch = drawn(module, 4, 1)
    plain = PlainNetwork(True, token=False).copy_from(module.teacher.network)
    with torch.no_grad():
        _, patches = plain(batch.views["global"].flatten(0, 1))
    chosen = patches.flatten(0, 1) if over == "all" else patches[batch.masks["global"].boolean.flatten(0, 1)]
    module.take_step(batch, module.build_optimizers())
    assert_close(module.patch_center.center, 0.2 * chosen.mean(0), atol=1e-6, rtol=1e-4)
    assert not torch.equal(module.patch_center.center, module.center.center)


def test_a_step_without_masked_patches_leaves_the_centre_over_masked_ones():
    module = begun(patch_center_over="masked")
    optimizers = module.build_optimizers()
    module.take_step(drawn(module, 4, 1), optimizers)
    before = module.patch_center.center.clone()
    module.take_step(random_batch(4, 2, masks_of(0, 0, 0, 0)), optimizers)
    assert before.any() and torch.equal(module.patch_center.center, before)


def test_padding_changes_no_target():
    """Of the same masks, padded more: what padding holds counts in no centre and no Sinkhorn balance."""
    for settings in ({"patch_center_over": "masked"}, {"target_rule": "sinkhorn"}):
        states, probs = [], []
        for length in (22, 64):
            module = begun(**settings)
            batch = random_batch(4, 0, masks_of(3, 0, 7, 1, length=length))
            with torch.no_grad():
                targets = module.targets(batch)
            probs.append(targets.patch_probs[targets.patch_weight > 0])
            module.take_step(batch, module.build_optimizers())
            states.append(flat_state(module))
        assert_close(probs[0], probs[1])
        for name in states[0]:
            assert_close(states[0][name], states[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_every_weight_of_the_teacher_follows_the_students_and_it_has_no_mask_token(shared):
    module = begun(shared_head=shared, momentum=0.5, freeze_last_layer=0.0, lr=1e-3)
    mine, theirs = dict(module.teacher.network.named_parameters()), dict(module.student.named_parameters())
    assert set(theirs) - set(mine) == {"mask_token"} and not set(mine) - set(theirs)
    assert sum("last_layer" in name for name in mine) == (2 if shared else 4)
    before = {name: p.clone() for name, p in mine.items()}
    module.step = 1
    module.take_step(drawn(module, 4, 1), module.build_optimizers())
    for name, old in before.items():
        assert_close(mine[name], 0.5 * old + 0.5 * theirs[name])
        assert not torch.equal(mine[name], old), name


def test_both_last_layers_are_frozen_together():
    module = tiny(shared_head=False, freeze_last_layer="1 epochs")
    optimizers = start(module)
    layers = [module.student.head.head.last_layer, module.student.head.patch_last_layer]
    before = [layer.weight_v.clone() for layer in layers]
    for step in range(3):
        moved = [not torch.equal(layer.weight_v, old) for layer, old in zip(layers, before)]
        assert moved == [False, False]
        module.take_step(drawn(module, 4, step), optimizers)
    assert all(not torch.equal(layer.weight_v, old) for layer, old in zip(layers, before))


def test_what_is_exported_is_what_timm_knows():
    module = tiny()
    assert "student.mask_token" in module.state_dict()
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **VIT)
    plain.load_state_dict(module.evaluated_backbone.model.state_dict())


# ---------------------------------------------------------------- time


def test_masking_may_start_late_and_the_patches_temperature_warms_up_from_there():
    module = tiny(
        mask_start="2 epochs",
        teacher_temperature=Linear(0.04, 0.07, until="2 epochs", every="epoch"),
        patch_teacher_temperature=Linear(0.04, 0.07, until="2 epochs", every="epoch"),
    ).train()
    module.begin(10, 2)
    found = []
    for module.step in range(10):
        losses = terms(module, drawn(module, 4, 5))
        found.append((module.at("teacher_temperature"), module.at("patch_teacher_temperature"), bool(losses["ibot"])))
    early, later = [(0.04, 0.04, False)] * 2 + [(0.07, 0.04, False)] * 2, [(0.07, 0.04, True)] * 2
    assert found == early + later + [(0.07, 0.07, True)] * 4


def test_nothing_is_hidden_from_the_student_before_masking_starts():
    module = tiny(mask_start="1 epochs").train()
    module.begin(4, 2)
    module.student.mask_token.data.normal_()
    masked, plain = drawn(module, 4, 0), random_batch(4, 0, masks_of(0, 0, 0, 0))
    assert masked.masks["global"].boolean.any()
    assert torch.equal(terms(module, masked)["dino"], terms(module, plain)["dino"])
    module.step = 2
    assert not torch.equal(terms(module, masked)["dino"], terms(module, plain)["dino"])


def test_entropy_and_divergence_make_up_both_losses():
    module = begun()
    batch = random_batch(4, 0, masks_of(5, 0, 0, 1))
    with torch.no_grad():
        targets = module.targets(batch)
    report = module.take_step(batch, module.build_optimizers(), measure=True)
    logged = module.diagnostics(report)
    assert logged["train/masks/masked_crops"] == pytest.approx(0.5)
    assert logged["train/teacher/kl"] == pytest.approx(report.terms["dino"] - report.teacher_entropy)
    # by crop: five tokens in one, one in the other, of both views
    real = torch.special.entr(targets.patch_probs).sum(1)[targets.patch_weight > 0].unflatten(0, (2, 6))
    by_crop = (real[:, :5].mean() + real[:, 5].mean()) / 2
    assert logged["train/teacher/patch_entropy"] == pytest.approx(float(by_crop), abs=1e-5)
    assert logged["train/teacher/patch_kl"] == pytest.approx(2 * report.terms["ibot"] - float(by_crop), abs=1e-5)


def test_measures_are_means_over_both_processes(pair):
    alone = begun(lr=1e-4)
    report = alone.take_step(measured_batch(0, 1), alone.build_optimizers(), measure=True)
    for measures in pair.run(measures_of_rank):
        assert measures == pytest.approx(report.measures, abs=1e-5)
    assert report.measures["masked_crops"] == pytest.approx(0.75)


def measured_batch(rank, world):
    whole = random_batch(4, 0)
    counts = (5, 0, 3, 9)
    batch = whole.part(rank, world)
    batch.masks["global"] = masks_of(*counts[rank * 4 // world : (rank + 1) * 4 // world])
    return batch


def measures_of_rank(rank, world):
    module = begun(lr=1e-4)
    return module.take_step(measured_batch(rank, world), module.build_optimizers(), measure=True).measures


# ---------------------------------------------------------------- settings


def test_a_convnet_is_refused_with_one_message():
    convnet = ConvNet("resnet18", arguments={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_width": 8})
    with pytest.raises(
        UserError, match=r"iBOT needs a backbone that can replace patches.*'resnet18' cannot.*Use a ViT"
    ):
        IBOT(convnet, views=VIEWS, num_prototypes=32, **HEAD)


def test_masks_are_of_the_global_views_on_the_backbones_grid():
    plans = tiny(micro_batches=2).mask_plans()
    assert list(plans) == ["global"]
    plan = plans["global"]
    assert (plan.views, plan.grid, plan.slices, plan.recipe) == (2, (4, 4), 2, BlockMasks())


def test_masking_every_global_view_is_warned_of():
    with pytest.warns(UserWarning, match="masks.share: 1 masks every global view"):
        tiny(masks=ScatteredMasks(share=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(masks=ScatteredMasks())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_prototypes": 0}, "num_prototypes: 0"),
        ({"target_rule": "guess"}, "target_rule: 'guess'"),
        ({"patch_center_momentum": 1.5}, "patch_center_momentum: 1.5"),
        ({"patch_center_over": "some"}, "patch_center_over: 'some'"),
        ({"dino_weight": 0}, r"dino_weight: 0 leaves.*does not learn"),
        ({"masks": RandomMasks()}, "RandomMasks masks every crop by the same count"),
        ({"mask_start": 3}, "length 3 is not a share"),
        ({"views": "plain"}, "at least 2 'global' views"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_built(settings, message):
    with pytest.raises(UserError, match=message):
        tiny(**settings)


def test_batch_normalisation_in_the_head_tells_pictures_apart_before_the_first_step():
    assert sameness(tiny()) > 0.9, "without it all answers are nearly one"
    assert sameness(tiny(head_batch_norm=True)) < 0.4, "with it they are not, whatever the patches are"
