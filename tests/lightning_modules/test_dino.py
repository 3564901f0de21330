import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_modules.dino import DINO
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.errors import UserError
from ssd.optim import Clip
from ssd.schedules import Cosine, Linear
from ssd.views.recipes import DINOViews
from tests.contract import MethodContract, flat_state, start

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
HEAD = {"head_hidden_dim": 16, "head_bottleneck_dim": 8}
VIEWS = DINOViews(global_size=32, local_size=16, local_count=2)


def tiny(**settings) -> DINO:
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=32, arguments=VIT)
    return DINO(backbone, **({"views": VIEWS, "num_prototypes": 32, **HEAD} | settings))


def random_batch(samples: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {
        "global": torch.randn(2, samples, 3, 32, 32, generator=generator),
        "local": torch.randn(2, samples, 3, 16, 16, generator=generator),
    }
    return Batch(views=views, index=torch.arange(samples), total=samples)


class TestContract(MethodContract):
    def make(self, **engine):
        # published rates are for long runs; a step of 1e-4 keeps Adam's sign noise below the tolerance
        return tiny(**{"lr": 1e-4, "lr_rule": "none"} | engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


class TestContractOfSinkhornAndTrainedGains(TestContract):
    def make(self, **engine):
        return tiny(lr=1e-4, lr_rule="none", target_rule="sinkhorn", norm_last_layer=False, **engine)


class TestContractOfRenormalisedPrototypes(TestContract):
    def make(self, **engine):
        return tiny(lr=1e-4, lr_rule="none", renormalize_prototypes=True, **engine)


def test_renormalised_prototypes_are_unit_vectors_after_each_step_and_the_teacher_averages_them():
    module = tiny(lr=0.1, lr_rule="none", renormalize_prototypes=True, momentum=0.5, freeze_last_layer=0.0)
    optimizers = start(module)
    old = module.teacher.network.head.last_layer.weight.clone()
    module.take_step(random_batch(4, 0), optimizers)
    new = module.student.head.last_layer.weight
    assert (new - old).abs().max() > 0.01, "or nothing is tested"
    assert_close(new.norm(dim=1), torch.ones(32))
    assert_close(module.teacher.network.head.last_layer.weight, F.normalize((old + new) / 2, dim=1))


# ---------------------------------------------------------------- against the paper, restated


class PlainHead(nn.Module):
    def __init__(self, dim, hidden, bottleneck, num_prototypes):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, bottleneck))
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1))

    def forward(self, x):
        x = self.mlp(x)
        x = x / x.norm(dim=-1, keepdim=True)
        return x @ (self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True)).T


class PlainNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, num_classes=0, dynamic_img_size=True, **VIT
        )
        self.head = PlainHead(24, 16, 8, 32)

    def forward(self, x):
        return self.head(self.backbone(x))

    def copy_from(self, branch):
        self.backbone.load_state_dict(branch.backbone.model.state_dict())
        self.head.mlp.load_state_dict(branch.head.mlp.state_dict())
        self.head.weight_v.data.copy_(branch.head.last_layer.weight_v)
        self.head.weight_g.data.copy_(branch.head.last_layer.weight_g)


def test_twenty_steps_equal_the_equations_of_the_paper_written_out():
    """Sections 2 to 5 of the published recipe, with plain loops: views by twos, AdamW by hand, schedules by formula."""
    steps, per_epoch, samples = 20, 5, 6
    base_lr, min_lr, warmup = 5e-4, 1e-6, 4
    module = tiny(
        lr=Cosine(base_lr, min_lr, warmup="4 steps"),
        lr_reference_batch=16,
        teacher_temperature=Linear(0.04, 0.07, until="2 epochs", every="epoch"),
        momentum=Cosine(0.9, 1.0),
        clip=Clip(0.5, over="tensor"),
        freeze_last_layer="1 epochs",
        norm_last_layer=False,
    )
    module.begin(steps, per_epoch)
    module.train()
    optimizers = module.build_optimizers()

    student, teacher = PlainNetwork(), PlainNetwork()
    student.copy_from(module.student)
    teacher.copy_from(module.student)
    center = torch.zeros(32)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p), 0) for name, p in student.named_parameters()}
    peak = base_lr * samples / 16

    for i in range(steps):
        batch = random_batch(samples, 100 + i)
        report = module.take_step(batch, optimizers)

        epoch = i // per_epoch
        temperature = [0.04, 0.07][epoch] if epoch < 2 else 0.07
        with torch.no_grad():
            teacher_out = [teacher(view) for view in batch.views["global"]]
        student_out = [student(view) for view in [*batch.views["global"], *batch.views["local"]]]
        loss, pairs = 0, 0
        for q_index, t in enumerate(teacher_out):
            q = torch.softmax((t - center) / temperature, dim=-1)
            for v_index, s in enumerate(student_out):
                if v_index != q_index:
                    loss = loss + (-q * F.log_softmax(s / 0.1, dim=-1)).sum(-1).mean()
                    pairs += 1
        assert pairs == 6
        loss = loss / pairs
        center = 0.9 * center + 0.1 * torch.cat(teacher_out).mean(0)
        gradients = dict(zip(moments, torch.autograd.grad(loss, list(student.parameters()))))

        if i < warmup:
            lr = peak * i / (warmup - 1)
        else:
            lr = min_lr + 0.5 * (peak - min_lr) * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup)))
        decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * i / steps))
        momentum = 1 - (1 - 0.9) * 0.5 * (1 + math.cos(math.pi * i / steps))
        with torch.no_grad():
            for name, p in student.named_parameters():
                if epoch < 1 and name.startswith("head.weight_"):
                    continue
                g = gradients[name]
                g = g * min(1.0, 0.5 / (float(g.norm()) + 1e-6))
                first, second, count = moments[name]
                first, second, count = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g, count + 1
                moments[name] = first, second, count
                if not (name.endswith(".bias") or p.ndim == 1):
                    p.mul_(1 - lr * decay)
                step = (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
                p.sub_(lr * step)
            for t, s in zip(teacher.parameters(), student.parameters()):
                t.mul_(momentum).add_(s, alpha=1 - momentum)
        assert report.terms["dino"] == pytest.approx(float(loss.detach()), abs=1e-5), f"step {i}"

    assert_close(module.center.center, center, atol=1e-5, rtol=0)
    for plain, ours in ((student, module.student), (teacher, module.teacher.network)):
        theirs = PlainNetwork()
        theirs.copy_from(ours)
        for (name, a), b in zip(plain.named_parameters(), theirs.parameters()):
            # key biases of attention have no gradient but rounding, which Adam scales up to whole steps
            if not name.endswith("qkv.bias"):
                assert_close(b, a, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_the_first_loss_sees_a_centre_of_zero():
    module = tiny()
    optimizers = start(module)
    batch = random_batch(8, 0)
    with torch.no_grad():
        logits = module.teacher({"global": batch.views["global"]}).logits()
    assert not module.center.center.any()
    module.take_step(batch, optimizers)
    assert_close(module.center.center, 0.1 * logits.flatten(0, 1).mean(0))


def test_the_centre_of_two_processes_is_that_of_all_samples(pair):
    first, second = pair.run(centre_of_rank)
    module = tiny()
    start(module)
    with torch.no_grad():
        logits = module.teacher({"global": random_batch(6, 0).views["global"]}).logits()
    expected = 0.1 * logits.flatten(0, 1).mean(0)
    assert_close(first, expected)
    assert torch.equal(first, second)


def centre_of_rank(rank, world):
    """Two samples on rank 0 and four on rank 1: the mean must not be a mean of means."""
    module = tiny()
    start(module)
    views = random_batch(6, 0).views["global"]
    with torch.no_grad():
        mine = views[:, :2] if rank == 0 else views[:, 2:]
        module.center.update(module.teacher({"global": mine}).logits())
    return module.center.center


def test_a_frozen_last_layer_keeps_its_bits_and_has_no_optimiser_state():
    module = tiny(freeze_last_layer="1 epochs", norm_last_layer=False)
    optimizers = start(module)
    last = module.student.head.last_layer
    before = last.weight_v.clone()
    for step in range(2):
        module.take_step(random_batch(8, step), optimizers)
    assert torch.equal(last.weight_v, before)
    assert last.weight_v not in optimizers[0].state and last.weight_g not in optimizers[0].state
    module.take_step(random_batch(8, 2), optimizers)
    assert not torch.equal(last.weight_v, before), "the freeze ends with the first epoch"


def test_the_teacher_moves_once_after_the_step():
    module = tiny(momentum=0.9, lr=1e-3)
    optimizers = start(module)
    module.step = 1
    teacher = [p.clone() for p in module.teacher.parameters()]
    module.take_step(random_batch(8, 0), optimizers)
    for old, new, student in zip(teacher, module.teacher.parameters(), module.student.parameters()):
        assert_close(new, 0.9 * old + 0.1 * student)


def test_only_the_student_drops_paths():
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.5, arguments=VIT)
    module = DINO(backbone, views=VIEWS, num_prototypes=32, **HEAD).train()
    x = random_batch(8, 0).views
    teacher = module.teacher({"global": x["global"]}).features
    assert torch.equal(teacher, module.teacher({"global": x["global"]}).features)
    assert not torch.equal(module.student(x).features, module.student(x).features)


def test_a_skipped_step_puts_batch_statistics_back():
    torch.manual_seed(0)
    backbone = ConvNet("resnet18", arguments={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_width": 8})
    module = DINO(backbone, views=VIEWS, num_prototypes=32, head_batch_norm=True, **HEAD)
    optimizers = start(module)
    module.take_step(random_batch(8, 0), optimizers)
    before = flat_state(module)
    assert any("running_mean" in name and value.any() for name, value in before.items())
    batch = random_batch(8, 1)
    batch.views["local"].view(-1)[0] = float("nan")
    report = module.take_step(batch, optimizers)
    assert report.not_finite == ("dino", "gradient")
    after = flat_state(module)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_entropy_and_divergence_make_up_the_loss():
    module = tiny()
    report = module.take_step(random_batch(8, 0), start(module), measure=True)
    assert 0 < report.teacher_entropy < math.log(32)
    assert module.diagnostics(report)["train/teacher/kl"] == pytest.approx(
        report.terms["dino"] - report.teacher_entropy
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_prototypes": 0}, "num_prototypes: 0"),
        ({"target_rule": "guess"}, "target_rule: 'guess'"),
        ({"center_momentum": 1.5}, "center_momentum: 1.5"),
        ({"micro_batches": 0}, "micro_batches: 0"),
        ({"lr_rule": "cubic"}, "lr_rule: 'cubic'"),
        ({"views": "plain"}, "two views in all"),
        ({"head_layers": 0}, "head_layers: 0"),
        ({"teacher_buffers": "none"}, "buffers: 'none'"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_built(settings, message):
    with pytest.raises(UserError, match=message):
        tiny(**settings)
