import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_modules.dinov3 import DINOv3
from ssd.backbones.convnet import ConvNet
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.masking.recipes import BlockMasks
from ssd.optim import Clip
from ssd.schedules import Cosine, Linear
from ssd.views.recipes import DINOViews
from tests.contract import MethodContract, flat_state, start
from tests.lightning_modules.masked import drawn, masks_of, random_batch, sameness, sinkhorn, terms

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "num_reg_tokens": 2, "init_values": 0.1}
HEAD = {"head_hidden_dim": 16, "head_bottleneck_dim": 8, "patch_head_bottleneck_dim": 6}
SIZES = {"num_prototypes": 32, "num_patch_prototypes": 24, "koleo_group": 2}
VIEWS = DINOViews(global_size=32, local_size=16, local_count=2)
GRAM = DINOViews(global_size=32, local_size=16, local_count=2, gram_size=64)


def tiny(vit=VIT, **settings) -> DINOv3:
    torch.manual_seed(0)
    backbone = ViT("vit_small_patch16_dinov3", img_size=32, arguments=vit)
    return DINOv3(backbone, **{"views": VIEWS, **SIZES, **HEAD} | settings)


def begun(total=4, **settings) -> DINOv3:
    module = tiny(**settings).train()
    module.begin(total, 2)
    return module


class TestContract(MethodContract):
    settings: dict = {}

    def make(self, **engine):
        # published rates are for long runs; a step of 1e-4 keeps Adam's sign noise below the tolerance
        return tiny(**{"lr": 1e-4, "lr_rule": "none"} | self.settings | engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed, gram=self.settings.get("views") is GRAM)


class TestContractOfTheGramStage(TestContract):
    settings = {"views": GRAM, "gram_anchor": "refresh", "gram_refresh_every": "2 steps", "own_local_norm": True}


# ---------------------------------------------------------------- against the paper, restated


class PlainNetwork(nn.Module):
    """Rotary positions, masks and heads with the published numbers; weights shared with the network under test."""

    def __init__(self, branch):
        super().__init__()
        self.model, self.heads = branch.backbone.model, (branch.head, branch.patch_head)
        self.token, self.local_norm = branch.mask_token, branch.local_norm

    def rotate(self, x, side):
        """(B, heads, N, 12): periods 100^(2 j / 6) of rows, then of columns, twice; second half against first."""
        centres = (torch.arange(side) + 0.5) / side * 2 - 1
        periods = 100.0 ** (2 * torch.arange(3) / 6)
        rows = (2 * math.pi * centres[:, None] / periods)[:, None].expand(side, side, 3)
        columns = (2 * math.pi * centres[:, None] / periods)[None].expand(side, side, 3)
        angle = torch.cat([rows, columns], -1).reshape(side * side, 6).repeat(1, 2)
        turned = torch.cat([-x[..., 6:], x[..., :6]], -1)
        return x * angle.cos() + turned * angle.sin()

    def backbone(self, x, masked=None, norm=None):
        m = self.model
        x = m.patch_embed.proj(x).flatten(2).transpose(1, 2)
        side = int(x.shape[1] ** 0.5)
        if masked is not None:
            x = torch.where(masked[..., None], self.token, x)
        first = torch.cat([m.cls_token, m.reg_token], 1).expand(len(x), -1, -1)
        x = torch.cat([first, x], 1)
        for block in m.blocks:
            y = F.layer_norm(x, (24,), block.norm1.weight, block.norm1.bias, 1e-5)
            q, k, v = F.linear(y, block.attn.qkv.weight).view(len(x), -1, 3, 2, 12).permute(2, 0, 3, 1, 4)
            q = torch.cat([q[:, :, :3], self.rotate(q[:, :, 3:], side)], 2)
            k = torch.cat([k[:, :, :3], self.rotate(k[:, :, 3:], side)], 2)
            y = (torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(12), -1) @ v).transpose(1, 2).flatten(2)
            x = x + block.gamma_1 * block.attn.proj(y)
            y = F.layer_norm(x, (24,), block.norm2.weight, block.norm2.bias, 1e-5)
            x = x + block.gamma_2 * block.mlp.fc2(F.gelu(block.mlp.fc1(y)))
        norm = m.norm if norm is None else norm
        return F.layer_norm(x, (24,), norm.weight, norm.bias, 1e-5)

    def answer(self, head, x):
        x = head.mlp(x)
        return (x / x.norm(dim=-1, keepdim=True)) @ head.last_layer.weight.T

    def forward(self, x, masked=None, norm=None):
        x = self.backbone(x, masked, norm)
        return x[:, 0], x[:, 3:], self.answer(self.heads[0], x[:, 0]), self.answer(self.heads[1], x[:, 3:])


def test_ten_steps_have_the_losses_of_the_equations_written_out():
    """Each term, gradient and the teacher of ten steps that our optimiser takes: rates and rules are DINOv2's, whose
    restatement covers them."""
    steps, samples = 10, 8
    module = tiny(
        views=GRAM,
        own_local_norm=True,
        koleo_group=4,
        gram_anchor="refresh",
        gram_refresh_every="3 steps",
        gram_refresh_from="4 steps",
        gram_refreshes=1,
        gram_weight=1.5,
        dino_local_weight=0.5,
        lr=Cosine(1e-3, 1e-6, warmup="2 steps"),
        lr_rule="none",
        teacher_temperature=Linear(0.04, 0.07, until=0.5),
        momentum=Cosine(0.9, 1.0),
        clip=Clip(0.5, over="module"),
    )
    module.begin(steps, 5)
    module.train()
    optimizers = module.build_optimizers()
    student, teacher = PlainNetwork(module.student), PlainNetwork(module.teacher.network)
    anchor = {name: value.clone() for name, value in module.student.backbone.state_dict().items()}
    for i in range(steps):
        batch = drawn(module, samples, 100 + i, gram=True)
        masked = batch.masks["global"].boolean
        temperature = 0.04 + 0.03 * min(i / 4, 1.0)
        with torch.no_grad():
            _, _, t_cls, t_patch = zip(*(teacher(view) for view in batch.views["global"]))
            q_cls = sinkhorn(torch.cat(t_cls), temperature).chunk(2)
            q_patch = sinkhorn(torch.cat([t_patch[v][masked[v]] for v in range(2)]), temperature)
            q_patch = q_patch.split([int(masked[v].sum()) for v in range(2)])
            gram_net = PlainNetwork(tiny(own_local_norm=True).student)
            gram_net.model.load_state_dict({name.removeprefix("model."): value for name, value in anchor.items()})
            fine = [gram_net(view)[1] for view in batch.views["gram"]]
            fine = [f.transpose(1, 2).reshape(samples, 24, 8, 8) for f in fine]
            fine = [F.interpolate(f, size=(4, 4), mode="bicubic").flatten(2).transpose(1, 2) for f in fine]
        seen = [student(view, masked[v]) for v, view in enumerate(batch.views["global"])]
        local = [student(view, norm=student.local_norm)[2] for view in batch.views["local"]]
        found = dict.fromkeys(("dino_global", "dino_local", "ibot", "koleo", "gram"), 0)
        for v in range(2):
            pairs = (-q_cls[v] * F.log_softmax(seen[1 - v][2] / 0.1, -1)).sum(-1)
            found["dino_global"] += pairs.mean() / 6
            for logits in local:
                found["dino_local"] += (-q_cls[v] * F.log_softmax(logits / 0.1, -1)).sum(-1).mean() / 6
            cost = (-q_patch[v] * F.log_softmax(seen[v][3][masked[v]] / 0.1, -1)).sum(-1)
            found["ibot"] += sum(c.mean() for c in cost.split(masked[v].sum(1).tolist()) if len(c)) / (2 * samples)
            x = seen[v][0] / seen[v][0].norm(dim=-1, keepdim=True)
            for b in range(samples):
                others = [j for j in range(b // 4 * 4, b // 4 * 4 + 4) if j != b]
                nearest = max(others, key=lambda j: float((x[b] @ x[j]).detach()))
                found["koleo"] -= torch.log((x[b] - x[nearest] + 1e-8).norm() + 1e-8) / samples
            s = seen[v][1] / seen[v][1].norm(dim=-1, keepdim=True)
            t = fine[v] / fine[v].norm(dim=-1, keepdim=True)
            gap = (s @ s.transpose(1, 2) - t @ t.transpose(1, 2)).square().mean((1, 2))
            found["gram"] += gap.mean() / 2
        loss = found["dino_global"] + 0.5 * found["dino_local"] + found["ibot"]
        loss = loss + 0.1 * found["koleo"] + 1.5 * found["gram"]
        parameters = [p for p in module.student.parameters() if p.requires_grad]
        norm = math.sqrt(sum(float(g.square().sum()) for g in torch.autograd.grad(loss, parameters)))
        before = {name: p.detach().clone() for name, p in module.teacher.network.named_parameters()}

        report = module.take_step(batch, optimizers)

        for name, value in found.items():
            assert report.terms[name] == pytest.approx(float(value.detach()), abs=1e-5), f"{name} in step {i}"
        assert report.gradient_norm == pytest.approx(norm, rel=1e-4)
        momentum = 1 - 0.1 * 0.5 * (1 + math.cos(math.pi * i / steps))
        theirs = dict(module.student.named_parameters())
        for name, p in module.teacher.network.named_parameters():
            assert_close(p, momentum * before[name] + (1 - momentum) * theirs[name].detach(), atol=1e-6, rtol=1e-5)
        if i + 1 == 6:  # the first multiple of 3 from step 4 on, and no other
            anchor = {name: value.clone() for name, value in module.teacher.network.backbone.state_dict().items()}
    assert all(torch.equal(anchor[n], v) for n, v in module.gram_teacher.network.state_dict().items())


# ---------------------------------------------------------------- closed forms


def test_uniform_networks_pay_log_k_in_sixteen_and_two_eighteenths_and_its_half():
    module = begun(views=DINOViews(global_size=32, local_size=16, local_count=8))
    batch = drawn(module, 8, 0)
    batch.views["local"] = torch.randn(8, 8, 3, 16, 16)
    for network in (module.student, module.teacher.network):
        for head in (network.head, network.patch_head):
            head.last_layer.weight.data[:] = 1.0
    found = terms(module, batch)
    assert float(found["dino_global"]) == pytest.approx(2 / 18 * math.log(32), abs=1e-4)
    assert float(found["dino_local"]) == pytest.approx(16 / 18 * math.log(32), abs=1e-4)
    assert float(found["ibot"]) == pytest.approx(math.log(24) / 2, abs=1e-4)


def test_a_single_picture_pays_for_the_two_pairs_of_different_views():
    module = begun(views=DINOViews(global_size=32, local_count=0), koleo_weight=0.0)
    batch = random_batch(1, 0, masks_of(3))
    del batch.views["local"]
    with torch.no_grad():
        targets = module.targets(batch)
        answers = module.student(
            batch.views,
            masked={"global": batch.masks["global"].boolean},
            places={"global": batch.masks["global"].flat_in_whole()},
        )
        p = F.log_softmax(answers.pictures.logits() / 0.1, -1)
        q = targets.probs
    wanted = 0.5 * (-(q[1, 0] * p[0, 0]).sum() - (q[0, 0] * p[1, 0]).sum())
    assert float(terms(module, batch)["dino_global"]) == pytest.approx(float(wanted), abs=1e-5)


def test_masked_counts_are_the_published_ones_in_every_step():
    plan = tiny().mask_plans()["global"]
    assert plan.recipe == BlockMasks(smallest=4, largest=0.5, even=True, filled=True)
    for seed in range(3):
        counts = plan.recipe.draw(2, 16, (16, 16), 0, seed).sum(2).ravel()
        expected = [32, 38, 44, 51, 57, 64, 70, 76, 83, 89, 96, 102, 108, 115, 121, 128]
        assert sorted(counts[counts > 0]) == expected and counts.sum() == 1274


@pytest.mark.parametrize(
    "done, fires", [(1_009_999, 0), (1_010_000, 1), (1_015_000, 0), (1_020_000, 1), (1_030_000, 1)]
)
def test_the_gram_teacher_is_refreshed_three_times(done, fires):
    module = tiny(
        gram_anchor="refresh",
        gram_refresh_from="1010000 steps",
        gram_refresh_every="10000 steps",
    )
    module.begin(2_000_000, 1000)
    assert module._refreshes_after(done) == bool(fires)
    assert not any(module._refreshes_after(step) for step in range(1_040_000, 1_100_000, 10_000))
    assert not module._refreshes_after(10_000)


@pytest.mark.parametrize("lr, batch, peak", [(0.004, 2048, 0.0056569), (2e-4, 4096, 4e-4), (1.2e-4, 4096, 2.4e-4)])
def test_published_peaks_of_the_learning_rate(lr, batch, peak):
    module = tiny(lr=lr)
    optimizers = start(module)
    module._write_rates(module.optimized()[0], optimizers[0], batch)
    assert max(group["lr"] for group in optimizers[0].param_groups) == pytest.approx(peak, rel=1e-4)


# ---------------------------------------------------------------- positions


def test_shifting_all_positions_changes_no_attention_between_patches_and_rotation_keeps_lengths():
    rope = tiny().student.backbone.model.rope
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    q, k = torch.randn(16, 12), torch.randn(16, 12)

    def at(coordinates):
        table = torch.cat(rope._get_pos_embed_from_coords(coordinates), -1)
        return apply_rot_embed_cat(q, table, half=True), apply_rot_embed_cat(k, table, half=True)

    coordinates = torch.rand(16, 2) * 2 - 1
    (q0, k0), (q1, k1) = at(coordinates), at(coordinates + torch.tensor([0.3, -0.7]))
    assert_close(q0 @ k0.T, q1 @ k1.T, atol=1e-4, rtol=1e-4)
    assert_close(q0.norm(dim=1), q.norm(dim=1), atol=1e-5, rtol=1e-5)


def test_rescaled_positions_are_drawn_for_each_block_and_forward_and_for_the_student_alone():
    module = begun(vit=VIT | {"rope_rescale_coords": 2.0})
    student, teacher = module.student.backbone, module.teacher.network.backbone
    ropes = student.embed(torch.randn(1, 3, 32, 32), None, None, None)[2]
    assert len(ropes) == 2 and not torch.equal(ropes[0], ropes[1])
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(student(x).patches, student(x).patches)
    assert torch.equal(teacher(x).patches, teacher(x).patches)
    assert torch.equal(teacher(x).patches, student.eval()(x).patches)
    # log-uniform between a half and two
    student.train()
    plain = tiny().student.backbone.model.rope.get_embed([4, 4])[:, :12].asin()
    factors = []
    for _ in range(300):
        (drawn_once, *_) = student.embed(x[:1], None, None, None)[2]
        factors.append(float(drawn_once[5, 2].asin() / plain[5, 2]))
    factors = torch.tensor(factors)
    assert factors.min() > 0.49 and factors.max() < 2.01
    assert float((factors < 1).float().mean()) == pytest.approx(0.5, abs=0.1)


# ---------------------------------------------------------------- the Gram stage


def test_the_gram_term_waits_for_its_weight_and_needs_no_views_of_its_own():
    module = begun(
        gram_anchor="refresh", gram_refresh_every="1 steps", gram_weight=Linear(0.0, 2.0, until="1 steps", after=0.5)
    )
    optimizers = module.build_optimizers()
    found = [set(module.take_step(drawn(module, 4, i), optimizers).terms) for i in range(4)]
    assert ["gram" in names for names in found] == [False, False, False, True]
    module.train()
    assert not any(p.requires_grad for p in module.gram_teacher.parameters()) and not module.gram_teacher.training


def test_a_gram_view_shows_what_its_global_view_shows_in_plain_colours():
    from ssd.views.parameters import Colour, draw

    boxes, colours = draw(GRAM, 300, 400, 0, 1, 2)
    assert (boxes["gram"] == boxes["global"]).all()
    assert (colours["gram"][:, Colour.BLUR] == 0).all() and (colours["gram"][:, Colour.BRIGHTNESS] == 1).all()
    alone = draw(VIEWS, 300, 400, 0, 1, 2)
    assert (alone[0]["local"] == boxes["local"]).all(), "more views change none of the others"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gram_anchor": "start"}, "gram_anchor: start is the teacher of the checkpoint.*Set start_from"),
        ({"gram_anchor": "refresh"}, "gram_anchor: refresh needs gram_refresh_every"),
        ({"num_patch_prototypes": 0}, "num_prototypes: 0"),
        ({"koleo_group": 1}, "koleo_group: 1"),
        ({"views": "plain"}, "at least 2 'global' views"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_built(settings, message):
    with pytest.raises(UserError, match=message):
        tiny(**settings)


def test_a_convnet_is_refused_with_one_message():
    convnet = ConvNet("resnet18", arguments={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_width": 8})
    with pytest.raises(UserError, match=r"DINOv3 needs a backbone that can replace patches.*Use a ViT"):
        DINOv3(convnet, views=VIEWS, **SIZES, **HEAD)


def test_evaluation_uses_the_common_norm():
    module = tiny(own_local_norm=True)
    assert "student.local_norm.weight" in module.state_dict()
    assert not any("local_norm" in name for name in module.evaluated_backbone.state_dict())
    with torch.no_grad():
        module.student.local_norm.weight.fill_(3.0)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(module.student.backbone(x).cls, module.eval().student.backbone(x).cls)


def test_all_of_a_stage_is_state():
    names = flat_state(tiny(gram_anchor="refresh", gram_refresh_every="5 steps"))
    assert any(name.startswith("gram_teacher.network.") for name in names)


def test_batch_normalisation_in_the_heads_tells_pictures_apart_before_the_first_step():
    assert sameness(tiny()) > 0.9, "without it all answers are nearly one"
    assert sameness(tiny(head_batch_norm=True)) < 0.4, "with it they are not, whatever the patches are"
