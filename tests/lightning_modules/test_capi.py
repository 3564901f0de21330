import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_modules.capi import CAPI
from ssd.backbones.rotary_vit import RotaryViT
from ssd.backbones.vit import ViT
from ssd.batch import Batch, Scores
from ssd.errors import UserError
from ssd.masking.recipes import BlockMasks, InverseBlockMasks, RandomMasks
from ssd.views.recipes import CropViews
from tests.contract import STEPS, MethodContract, flat_state, start
from tests.lightning_modules.masked import sinkhorn
from tests.lightning_modules.runs import At, digits, fit

NETWORK = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_registers": 4, "predictor_depth": 2}


def tiny(**settings) -> CAPI:
    torch.manual_seed(0)
    backbone = RotaryViT(**{**NETWORK, **settings.pop("network", {})})
    return CAPI(backbone, **{"views": CropViews(size=32), "num_prototypes": 16, "predicted": 0.3} | settings)


def random_batch(samples: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {"global": torch.randn(1, samples, 3, 32, 32, generator=generator)}
    return Batch(views=views, index=torch.arange(samples), total=samples)


def masked_batch(module: CAPI, samples: int, seed: int) -> Batch:
    batch = random_batch(samples, seed)
    batch.masks["global"] = module.mask_plans()["global"].draw(samples, 0, seed)
    return batch


def terms(module: CAPI, batch: Batch) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return module.losses(batch, module.targets(batch))


class TestContract(MethodContract):
    def make(self, **engine):
        return tiny(**{"lr": 1e-4, "clustering_lr": 1e-4, "momentum": 0.9} | engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


class TestContractOfJointSinkhorn(TestContract):
    def make(self, **engine):
        return super().make(positionwise=False, **engine)


# ------------------------------------------------------------------ masks


def test_of_256_patches_166_are_hidden_90_visible_and_8_predicted():
    plan = CAPI(RotaryViT(embed_dim=32, depth=1, num_heads=2, predictor_depth=1), num_prototypes=8).mask_plans()[
        "global"
    ]
    assert plan.grid == (16, 16)
    for step in range(3):
        masks = plan.draw(32, 0, step)
        assert (masks.masked.shape, masks.visible.shape, masks.predicted.shape) == (
            (1, 32, 166),
            (1, 32, 90),
            (1, 32, 8),
        )
        assert masks.boolean.gather(2, masks.predicted).all(), "of the hidden ones"
        assert (masks.predicted.diff(dim=2) > 0).all(), "each once"
    plain = [plan.draw(64, 0, step).predicted for step in (0, 0, 1)]
    assert torch.equal(plain[0], plain[1]) and not torch.equal(plain[0], plain[2])
    # every hidden place is as likely as another: 8 of 166
    counts = torch.zeros(166)
    for step in range(40):
        masks = plan.draw(64, 1, step)
        rank = torch.searchsorted(masks.masked[0], masks.predicted[0])
        counts += torch.bincount(rank.flatten(), minlength=166)
    assert_close(counts / (40 * 64), torch.full((166,), 8 / 166), atol=0.02, rtol=0)


def test_what_is_predicted_is_cut_over_ranks_and_slices_as_the_step_drew_it():
    plan = tiny(micro_batches=2).mask_plans()["global"]
    whole = plan.draw(8, 0, 3).predicted
    halves = [plan.draw(4, 0, 3, rank=rank, world=2) for rank in range(2)]
    assert torch.equal(torch.cat([half.predicted for half in halves], dim=1), whole)
    assert torch.equal(torch.cat([halves[0].part(number, 2).predicted for number in range(2)], 1), halves[0].predicted)


# ------------------------------------------------------------------ the losses


def test_the_losses_are_those_of_the_paper_written_out():
    """Place by place and patch by patch, with Sinkhorn as the paper writes it."""
    module = tiny(views=CropViews(size=32), masks=RandomMasks(0.5))
    batch = masked_batch(module, 6, 1)
    teacher, student, masks = module.teacher.network.backbone, module.student, batch.masks["global"]
    with torch.no_grad():
        module.clusters.bias.normal_()
        patches = teacher(batch.views["global"][0]).patches
        features = patches / patches.norm(dim=-1, keepdim=True)
        logits = features @ module.clusters.weight.T + module.clusters.bias  # (B, N, K)
        assigned = torch.stack([sinkhorn(logits[:, place], 0.06) for place in range(16)], dim=1)
        clustering = -(assigned * F.log_softmax(logits / 0.12, -1)).sum(-1).mean()
        costs = []
        for row in range(6):
            picture, visible = batch.views["global"][0, row : row + 1], masks.visible[0, row : row + 1]
            tokens = student.backbone(picture, visible=visible)
            answers = student.backbone.predict(tokens, visible, masks.predicted[0, row : row + 1])[0]
            directions = F.normalize(student.head.last_layer.weight_v, dim=1)
            cosines = F.normalize(answers, dim=1) @ directions.T
            for place, cosine in zip(masks.predicted[0, row].tolist(), cosines):
                costs.append(-(assigned[row, place] * F.log_softmax(cosine / 0.12, -1)).sum())
        found = terms(module, batch)
        assert len(costs) == 6 * 2
        assert_close(found["predicted"], torch.stack(costs).mean(), atol=1e-5, rtol=1e-4)
        assert_close(found["clustering"], clustering, atol=1e-5, rtol=1e-4)


def test_losses_begin_near_ln_k():
    """Cosines over .12 spread little; scores of clusters are as N(0, 1), for features have unit length."""
    module = tiny(num_prototypes=4096, network={"embed_dim": 128})
    batch = masked_batch(module, 8, 0)
    assert abs(float(terms(module, batch)["predicted"]) - math.log(4096)) < 0.5
    with torch.no_grad():
        features = F.normalize(module.teacher(batch.views["global"]), dim=-1)
        logits = module.cluster_scores(features).logits()
    assert abs(float(logits.mean())) < 0.1 and abs(float(logits.std()) - 1) < 0.1


def test_each_loss_reaches_its_own_network_alone():
    module = tiny()
    batch = masked_batch(module, 4, 0)
    with torch.no_grad():
        targets = module.targets(batch)
    for term, learns in (("predicted", module.student), ("clustering", module.clusters)):
        module.zero_grad()
        module.losses(batch, targets)[term].backward()
        mine = {name for name, p in module.named_parameters() if p.grad is not None}
        assert mine == {name for name, p in module.named_parameters() if any(p is q for q in learns.parameters())}


def test_pixels_of_hidden_patches_reach_the_targets_and_not_the_student():
    module = tiny().eval()
    batch = masked_batch(module, 4, 0)
    masks = batch.masks["global"]
    with torch.no_grad():
        before, targets = module.student(batch.views["global"], masks.visible, masks.predicted), module.targets(batch)
    row, column = divmod(int(masks.masked[0, 0, 0]), 4)
    batch.views["global"][0, 0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = torch.randn(3, 8, 8)
    with torch.no_grad():
        assert torch.equal(
            module.student(batch.views["global"], masks.visible, masks.predicted).features, before.features
        )
    assert not torch.equal(module.targets(batch).patch_probs, targets.patch_probs)


def test_clusters_are_balanced_in_each_place_by_itself_or_in_all_together():
    """Patches of a place that permute their samples take their assignments along, and leave other places alone."""
    module, joint = tiny(), tiny(positionwise=False)
    logits = 3 * torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(0))
    moved = logits.clone()
    moved[0, :, 5] = logits[0, :, 5].roll(1, dims=0)
    other = logits.clone()
    other[0, :, 5] *= 2
    probs, permuted, changed = (module.assign(each, 0.06) for each in (logits, moved, other))
    assert_close(permuted[0, :, 5], probs[0, :, 5].roll(1, dims=0))
    rest = [place for place in range(16) if place != 5]
    assert torch.equal(permuted[:, :, rest], probs[:, :, rest]) and torch.equal(changed[:, :, rest], probs[:, :, rest])
    assert not torch.allclose(joint.assign(other, 0.06)[:, :, rest], joint.assign(logits, 0.06)[:, :, rest])
    # a cluster that means a place gets there what every other gets, and nothing overflows
    logits[0, :, 5, 3] += 1000
    assert_close(module.assign(logits, 0.06), probs, atol=1e-3, rtol=1e-2)
    shares = joint.assign(logits, 0.06)[0, :, :, 3].sum(0)
    assert shares[5] > 0.9 * shares.sum(), "all that this cluster may have"


# ------------------------------------------------------------------ the step


def test_the_teacher_stays_the_first_draw_while_momentum_is_one():
    module = tiny(lr=1e-2)
    module.begin(1000, 10)
    optimizers = start(module)
    assert module.at("momentum") == 1 and module.at("clustering_lr") == 0
    before = flat_state(module.teacher)
    module.take_step(masked_batch(module, 4, 0), optimizers)
    assert all(torch.equal(before[name], value) for name, value in flat_state(module.teacher).items())
    module.take_step(masked_batch(module, 4, 1), optimizers)
    assert not all(torch.equal(before[name], value) for name, value in flat_state(module.teacher).items())


def test_published_schedules():
    module = tiny()
    module.begin(1000, 10)
    ends = {name: module.value_of(getattr(module, name), 999) for name in ("lr", "clustering_lr", "momentum")}
    assert ends["lr"] / 1e-3 == pytest.approx(0.0963138, abs=1e-7)
    assert ends["clustering_lr"] / 5e-4 == pytest.approx(0.0963138, abs=1e-7)
    assert ends["momentum"] == pytest.approx(0.99990369, abs=1e-8)
    for step in (0, 50, 99, 100, 500, 999):
        share = (1 - module.value_of(module.momentum, step)) / module.value_of(module.lr, step) if step else 1
        assert share == pytest.approx(1), "1 - m follows the learning rate"
    module.begin(500_000, 10)
    module.total_steps = 500_000
    assert module.value_of(module.lr, 499_999) / 1e-3 == pytest.approx(0.0954915, abs=1e-5)
    assert module.value_of(module.lr, 49_999) == module.value_of(module.lr, 50_000) == 1e-3, "the peak occurs twice"


def test_two_optimisers_with_their_own_rates_and_decay():
    module = tiny(lr=1e-3, clustering_lr=5e-4)
    module.begin(STEPS, 2)
    student, clusters = start(module)
    module.take_step(masked_batch(module, 4, 0), [student, clusters])
    names = {id(p): name for name, p in module.named_parameters()}
    rates = {
        names[id(p)]: (g["lr"], g["weight_decay"])
        for o in (student, clusters)
        for g in o.param_groups
        for p in g["params"]
    }
    assert rates.pop("clusters.weight") == rates.pop("clusters.bias") == (5e-4, 0.01)
    backbone = "student.backbone.model"
    assert rates.pop(f"{backbone}.patch_embed.weight") == pytest.approx((2e-4, 0.1))
    assert rates.pop(f"{backbone}.patch_embed.bias") == pytest.approx((2e-4, 0.0))
    for name, found in rates.items():
        assert found == pytest.approx((1e-3, 0.01 if "norm" in name else 0.1)), name
    assert {"registers", "predictor.mask_token"} <= {name.removeprefix(f"{backbone}.") for name in rates}
    assert all(group["betas"] == (0.9, 0.95) for o in (student, clusters) for group in o.param_groups)


def test_a_student_that_is_not_finite_skips_clusters_and_teacher_too():
    module = tiny(lr=1e-2, clustering_lr=1e-2, momentum=0.5)
    optimizers = start(module)
    module.take_step(masked_batch(module, 4, 0), optimizers)
    before = flat_state(module)
    broken = module.student.register_forward_hook(
        lambda network, given, scores: Scores(scores.features * math.nan, scores.prototypes)
    )
    report = module.take_step(masked_batch(module, 4, 1), optimizers)
    broken.remove()
    assert report.not_finite[0] == "predicted" and "clustering" not in report.not_finite
    assert all(torch.equal(before[name], value) for name, value in flat_state(module).items())


def test_clusters_learn_what_they_assign_and_the_student_to_tell_it():
    """On pictures of a few colours both losses fall towards the entropy of the assignments."""
    module = tiny(lr=3e-3, clustering_lr=3e-2, momentum=1.0, positionwise=False, patch_embed_lr_scale=1.0)
    module.begin(60, 10)
    optimizers = start(module)
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(4, 3, 1, 1, generator=generator)
    reports = []
    for step in range(60):
        batch = masked_batch(module, 16, step)
        drawn = torch.randint(4, (16,), generator=generator)
        batch.views["global"] = (colours[drawn] + 0.1 * batch.views["global"][0])[None]
        reports.append(module.take_step(batch, optimizers, measure=True))
    entropy = reports[-1].measures["patch_entropy"]
    assert reports[-1].terms["clustering"] - entropy < 0.3 * (
        reports[0].terms["clustering"] - reports[0].measures["patch_entropy"]
    )
    assert reports[-1].terms["predicted"] < reports[0].terms["predicted"] - 0.3
    assert reports[-1].uses["patch"].perplexity > 8, "all clusters are used"
    numbers = module.diagnostics(reports[-1])
    assert numbers["train/teacher/cluster_kl"] == pytest.approx(reports[-1].terms["clustering"] - entropy)
    assert module.diagnostics(reports[-1].__class__(**{**vars(reports[-1]), "measures": {}})) == {}


# ------------------------------------------------------------------ inside Lightning


def small(drop_path_rate: float = 0.5, **settings) -> CAPI:
    """With drop path, which a resume must draw again as it would have been."""
    network = {"in_chans": 1, "drop_path_rate": drop_path_rate}
    return tiny(network=network, **{"views": CropViews(size=32, evaluation_crop=1.0), "lr": 1e-3} | settings)


def test_a_resumed_run_ends_as_one_without_a_stop(tmp_path):
    straight = small(steps=14)
    fit(tmp_path / "straight", straight, digits(), limit_val_batches=0)
    stop = At(9, lambda trainer, module: setattr(module, "stop_requested", True))
    fit(tmp_path / "stopped", small(steps=14), digits(), callbacks=[stop], limit_val_batches=0)
    resumed = small(steps=14)
    file = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    trainer = fit(tmp_path / "on", resumed, digits(), resume=file, limit_val_batches=0)
    assert resumed.step == 14
    expected = flat_state(straight)
    assert all(torch.equal(expected[name], value) for name, value in flat_state(resumed).items())
    assert len(trainer.optimizers) == 2 and all(optimizer.state for optimizer in trainer.optimizers)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"masks": BlockMasks()}, "Use RandomMasks"),
        ({"masks": InverseBlockMasks((0.5, 0.7))}, "Use RandomMasks"),
        ({"predicted": 0.0}, "predicted: 0.0 is not a share"),
        ({"student_temperature": 0.0}, "student_temperature: 0.0 divides scores"),
        ({"clustering_temperature": -1.0}, "clustering_temperature: -1.0 divides scores"),
        ({"num_prototypes": 0}, "num_prototypes: 0"),
        ({"network": {"predictor_depth": 0}}, "Set its predictor_depth"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        tiny(**settings)


def test_a_network_without_a_predictor_of_its_own_is_refused():
    with pytest.raises(UserError, match="CAPI needs a backbone that can predict hidden places"):
        CAPI(ViT("vit_tiny_patch16_224", arguments={"embed_dim": 32, "depth": 1, "num_heads": 2}))
