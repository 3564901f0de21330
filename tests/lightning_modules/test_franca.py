import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_modules.dinov2 import DINOv2
from lightning_modules.franca import Franca
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.masking.recipes import InverseBlockMasks
from ssd.nested_heads import NestedHead
from tests.contract import MethodContract
from tests.lightning_modules.masked import drawn, random_batch, sinkhorn, terms
from tests.lightning_modules.test_dinov2 import HEAD, VIEWS, VIT

SIZES = {"num_prototypes": 32, "koleo_group": 2, "levels": 3}


def tiny(**settings) -> Franca:
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=32, arguments=VIT)
    return Franca(backbone, **{"views": VIEWS, **SIZES, **HEAD} | settings)


def begun(**settings) -> Franca:
    module = tiny(**settings).train()
    module.begin(4, 2)
    return module


class TestContract(MethodContract):
    settings: dict = {}

    def make(self, **engine):
        return tiny(**{"lr": 1e-4, "lr_rule": "none"} | self.settings | engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


class TestContractOfTheReleasedForm(TestContract):
    settings = {"projected": True}


def test_widths_and_prototypes_are_the_published_ones():
    with torch.device("meta"):
        head = NestedHead(768, 131072, 5, hidden_dim=8, bottleneck_dim=4)
    assert head.widths == [48, 96, 192, 384, 768]
    assert [len(level.last_layer.weight_v) for level in head.heads] == [8192, 16384, 32768, 65536, 131072]


def test_a_level_does_not_see_what_lies_beyond_its_width():
    head = NestedHead(24, 32, 3, hidden_dim=8, bottleneck_dim=4)
    features = torch.randn(5, 24)
    changed = features.clone()
    changed[:, 12:] += 1
    same = [torch.equal(a.features, b.features) for a, b in zip(head(features), head(changed))]
    assert same == [True, True, False]
    projected = NestedHead(24, 32, 3, projected=True, hidden_dim=8, bottleneck_dim=4)
    assert not any(torch.equal(a.features, b.features) for a, b in zip(projected(features), projected(changed)))
    with pytest.raises(UserError, match="levels: 5 does not halve 24 dimensions"):
        NestedHead(24, 32, 5)


def test_the_released_form_meets_prototypes_at_any_length_behind_a_gelu():
    head = NestedHead(24, 32, 1, projected=True, hidden_dim=8, bottleneck_dim=4)
    x = torch.randn(5, 24)
    (scores,) = head(x)
    mlp = head.heads[0].mlp
    y = mlp[0](x)
    for linear in (mlp[1], mlp[3], mlp[5]):
        y = F.gelu(linear(y))
    assert_close(scores.features, y)
    assert_close(head.heads[0].last_layer().norm(dim=1), torch.ones(32))


def test_uniform_networks_pay_the_sum_of_the_levels_and_its_half():
    module = begun()
    for network in (module.student, module.teacher.network):
        for nested in (network.head, network.patch_head):
            for head in nested.heads:
                head.last_layer.weight_v.data[:] = 1.0
    found = terms(module, drawn(module, 8, 0))
    total = math.log(8) + math.log(16) + math.log(32)
    assert float(found["dino"]) == pytest.approx(total, abs=1e-4)
    assert float(found["ibot"]) == pytest.approx(total / 2, abs=1e-4)
    published = sum(math.log(131072 / 2**level) for level in range(5))
    assert published == pytest.approx(51.9861, abs=1e-4)


def test_the_terms_are_those_of_each_level_written_out():
    module = begun(teacher_temperature=0.05)
    batch = drawn(module, 8, 3)
    masks = batch.masks["global"]
    with torch.no_grad():
        targets = module.targets(batch)
        places = {"global": masks.flat_in_whole()}
        student = module.student(batch.views, masked={"global": masks.boolean}, places=places)
        teacher = module.teacher({"global": batch.views["global"]}, places=places)
        dino = ibot = 0.0
        real = targets.patch_weight > 0
        for level in range(3):
            q = sinkhorn(teacher.pictures[level].logits().flatten(0, 1), 0.05).view(2, 8, -1)
            p = F.log_softmax(student.pictures[level].logits() / 0.1, -1)
            pairs = [-(q[v] * p[s]).sum(-1).mean() for v in range(2) for s in range(4) if v != s]
            dino += float(sum(pairs) / len(pairs))
            q = sinkhorn(teacher.patches[level].logits()[real], 0.05)
            cost = -(q * F.log_softmax(student.patches[level].logits()[real] / 0.1, -1)).sum(-1)
            ibot += float((targets.patch_weight[real] * cost).sum() / 16)
    found = terms(module, batch)
    assert float(found["dino"]) == pytest.approx(dino, abs=1e-4)
    assert float(found["ibot"]) == pytest.approx(ibot, abs=1e-4)


def test_one_level_is_dinov2():
    settings = {"target_rule": "sinkhorn", "shared_head": False, "koleo_group": 2, "num_prototypes": 32}
    torch.manual_seed(0)
    backbone = ViT("vit_tiny_patch16_224", img_size=32, arguments=VIT)
    plain = DINOv2(
        backbone, views=VIEWS, masks=InverseBlockMasks(ratio=(0.1, 0.65), share=0.5), **HEAD | settings
    ).train()
    plain.begin(4, 2)
    one = begun(levels=1)
    state = {name: value for name, value in plain.state_dict().items() if name != "_extra_state"}
    names = {name.replace("head.heads.0.", "head."): name for name in one.state_dict() if name != "_extra_state"}
    assert names.keys() == state.keys()
    one.load_state_dict({names[name]: value for name, value in state.items()} | {"_extra_state": one.get_extra_state()})
    batch = drawn(plain, 8, 0)
    expected, found = terms(plain, batch), terms(one, batch)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_divergences_are_sums_over_levels():
    module = begun()
    report = module.take_step(drawn(module, 8, 1), module.build_optimizers(), measure=True)
    numbers = module.diagnostics(report)
    assert numbers["train/masks/masked_crops"] == pytest.approx(0.5)
    assert 0 < numbers["train/teacher/kl"] < report.terms["dino"]
    assert 0 < numbers["train/teacher/patch_kl"] < 2 * report.terms["ibot"]


@pytest.mark.parametrize("settings", [{"shared_head": True}, {"target_rule": "centering"}])
def test_what_franca_is_not_is_refused(settings):
    with pytest.raises(UserError, match="Franca's heads are apart"):
        tiny(**settings)
