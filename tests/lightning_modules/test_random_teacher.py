import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_modules.random_teacher import RandomTeacher, blend
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.errors import UserError
from ssd.losses.divergence import divergence
from ssd.views.recipes import PlainViews
from tests.contract import MethodContract, flat_state, run_steps, start

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8, "zero_init_last": False}
HEAD = {"num_prototypes": 32, "head_hidden_dim": 16, "head_bottleneck_dim": 8}


def vit(**settings) -> RandomTeacher:
    torch.manual_seed(0)
    return RandomTeacher(
        ViT("vit_tiny_patch16_224", img_size=16, arguments=VIT), **{"views": PlainViews(size=16), **HEAD} | settings
    )


def convnet(**settings) -> RandomTeacher:
    torch.manual_seed(0)
    backbone = ConvNet("resnet18", arguments=RESNET)
    return RandomTeacher(backbone, **{"views": PlainViews(size=16), **HEAD} | settings)


def random_batch(samples: int, seed: int) -> Batch:
    pictures = torch.randn(1, samples, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return Batch(views={"global": pictures}, index=torch.arange(samples), total=samples)


class TestContract(MethodContract):
    def make(self, **engine):
        return vit(**{"distance": 0.3, "lr": 1e-4} | engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


def test_twenty_steps_equal_the_equations_written_out():
    module = vit(distance=0.3)
    student, teacher = vit(distance=0.3).student, vit(distance=0.3).teacher.network
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    module.begin(20, 5)
    module.train()
    optimizers = module.build_optimizers()
    for i in range(20):
        batch = random_batch(8, i)
        report = module.take_step(batch, optimizers, measure=True)
        with torch.no_grad():
            q = torch.softmax(teacher(batch.views).logits()[0], dim=-1)
        cross_entropy = -(q * F.log_softmax(student(batch.views).logits()[0], dim=-1)).sum(-1).mean()
        optimizer.zero_grad()
        cross_entropy.backward()
        optimizer.step()
        entropy = torch.special.entr(q).sum(-1).mean()
        assert report.terms["kl"] == pytest.approx(float((cross_entropy - entropy).detach()), abs=2e-6)
        told = module.diagnostics(report)["train/teacher/cross_entropy"]
        assert told == pytest.approx(float(cross_entropy.detach()), abs=1e-5)
    for (name, ours), theirs in zip(module.student.named_parameters(), student.parameters()):
        if not name.endswith("qkv.bias"):  # of keys, which have no gradient but rounding
            assert_close(ours, theirs, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_copy_of_the_teacher_has_nothing_to_learn():
    module = vit(distance=0.0).double().train()
    module.begin(4, 2)
    batch = random_batch(8, 0)
    batch.views["global"] = batch.views["global"].double()
    with torch.no_grad():
        targets = module.targets(batch)
    loss = module.losses(batch, targets)["kl"]
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in module.student.parameters() if p.grad is not None) < 1e-12
    assert abs(float(loss.detach())) < 1e-12


@pytest.mark.parametrize(
    "share, mine, theirs", [(0.1, 0.99388, 0.11043), (0.5, 0.70711, 0.70711), (0.6, 0.55470, 0.83205), (1, 0, 1)]
)
def test_weights_start_between_two_draws_at_the_variance_of_both(share, mine, theirs):
    one, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    before = one.weight.detach().clone()
    one.bias.data[:] = other.bias.data[:] = 1.0
    blend(one, other, share)
    assert_close(one.weight.detach(), mine * before + theirs * other.weight.detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(one.bias, torch.ones(4)), "what every draw shares stays"


def test_uniform_answers_differ_by_nothing_and_cross_entropy_is_divergence_and_entropy():
    assert divergence(torch.zeros(1, 3, 65536), torch.full((1, 3, 65536), -math.log(65536)), 1.0).abs().max() < 1e-5
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7).log_softmax(-1)
    cross_entropy = -(teacher.exp() * student.log_softmax(-1)).sum(-1)
    apart = divergence(student, teacher, 1.0)
    assert_close(apart, cross_entropy - torch.special.entr(teacher.exp()).sum(-1))
    (ours,) = torch.autograd.grad(apart.sum(), student)
    (theirs,) = torch.autograd.grad(-(teacher.exp() * student.log_softmax(-1)).sum(), student)
    assert_close(ours, theirs)


def test_the_teacher_stays_as_drawn_with_its_first_statistics_and_the_student_is_what_is_kept():
    module = convnet(distance=0.5)
    before = {name: value for name, value in flat_state(module).items() if name.startswith("teacher.")}
    run_steps(module, [random_batch(8, i) for i in range(3)])
    after = flat_state(module)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(layer.training for layer in module.teacher.modules())
    assert module.evaluated_backbone is module.student.backbone
    means = [value for name, value in after.items() if name.startswith("student.") and name.endswith("running_mean")]
    assert all(mean.any() for mean in means), "the student normalises by batch and gathers statistics"


def test_prototypes_without_weight_norm_are_those_of_the_released_code():
    module = vit(weight_norm=False, num_prototypes=512, head_bottleneck_dim=256)
    lengths = module.teacher.network.head.last_layer().norm(dim=1)
    assert float(lengths.mean()) == pytest.approx(0.32, abs=0.01)
    assert_close(vit().teacher.network.head.last_layer().norm(dim=1), torch.ones(32))


def test_half_precision_is_refused():
    module = vit().train()
    optimizers = start(module)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=r"32-true"):
        module.take_step(random_batch(8, 0), optimizers)


def test_a_distance_that_is_none_is_refused():
    with pytest.raises(UserError, match="distance: 2 is not a share"):
        vit(distance=2)
