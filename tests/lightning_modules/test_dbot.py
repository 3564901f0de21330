import pytest
import torch
from torch.testing import assert_close

from lightning_modules.dbot import DBOT
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.masking.recipes import BlockMasks
from ssd.optim import Clip
from ssd.record import build, describe
from ssd.schedules import Cosine
from ssd.views.recipes import CropViews
from tests.contract import MethodContract, flat_state, run_steps
from tests.lightning_modules.test_mae import DECODER, VIT, random_batch

STAGES = {"stages": (1.0, 1.0)}


def vit(**settings) -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=32, fixed_positions=True, arguments={**VIT, **settings})


def tiny(**settings) -> DBOT:
    torch.manual_seed(0)
    defaults = {"views": CropViews(size=32), "decoder_drop_path_rate": 0.0, "lr": 1e-4, "lr_rule": "none", **DECODER}
    return DBOT(vit(), **defaults | settings)


def masked_batch(module: DBOT, samples: int, seed: int):
    batch = random_batch(samples, seed)
    batch.masks["global"] = module.mask_plans()["global"].draw(samples, 0, seed)
    return batch


class TestContract(MethodContract):
    """Two stages, of one step and of three: their edge lies inside the steps that are compared."""

    def make(self, **engine):
        return tiny(**{"stages": (1.0, 3.0)} | engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


def begun(steps: int = 4, **settings) -> tuple[DBOT, list]:
    module = tiny(**settings)
    module.train()
    module.begin(steps, 2)
    return module, module.build_optimizers()


def stepped(module, optimizers, steps: int) -> None:
    for step in range(steps):
        module.take_step(masked_batch(module, 4, step), optimizers)


def test_the_loss_is_the_equation_as_published_on_hidden_patches_and_the_class_token():
    module = tiny()
    batch = masked_batch(module, 3, 0)
    with torch.no_grad():
        targets = module.targets(batch)
        found = module.losses(batch, targets)["features"]
        pictures, masks = batch.views["global"][0], batch.masks["global"]
        model = module.student.backbone.model
        raw = model.norm_pre(model._pos_embed(model.patch_embed(pictures)))
        for block in model.blocks:  # the first teacher is a copy of the first student; no final norm
            raw = block(raw)
        target = (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, keepdim=True) + 1e-6).sqrt()
        decoded = module.student(batch.views["global"], masks.visible)
        predicted = torch.cat([decoded.cls[0][:, None], decoded.patches[0]], dim=1)
        counted = torch.cat([torch.ones(3, 1, dtype=torch.bool), masks.boolean[0]], dim=1)
        error = (predicted - target).abs()
        error = torch.where(error < 2, error**2 / 4, error - 1).mean(-1)
    assert counted.sum() == 3 * 13
    assert_close(found, error[counted].mean(), atol=1e-6, rtol=1e-5)


def test_an_error_of_one_on_what_counts_costs_a_quarter_whatever_happens_elsewhere():
    module = tiny()
    batch = masked_batch(module, 2, 0)
    masks = batch.masks["global"].boolean
    with torch.no_grad():
        targets = module.targets(batch)

    class Says(torch.nn.Module):
        def forward(self, pictures, visible):
            from ssd.masked_branch import Decoded

            return Decoded(targets.patches + torch.where(masks[..., None], 1.0, 100.0), targets.cls - 1, None)

    module.student = Says()
    assert_close(module.losses(batch, targets)["features"], torch.tensor(0.25))


def test_between_stages_the_student_becomes_the_teacher_and_begins_again():
    module, optimizers = begun(lr=1e-2, **STAGES)
    first_draw = flat_state(module.student)
    stepped(module, optimizers, 1)
    assert module.stage == 0 and all(optimizers[0].state.values())
    before = {name: value.clone() for name, value in module.student.backbone.state_dict().items()}
    edge = masked_batch(module, 4, 1)
    # the second step moves the student once more before it becomes the teacher
    module.take_step(edge, optimizers)
    assert module.stage == 1 and module.step == 2
    teacher = module.teacher.network.state_dict()
    assert any((teacher[name] != before[name]).any() for name in before)
    assert not optimizers[0].state, "the optimiser has forgotten"
    now = flat_state(module.student)
    drawn = [name for name in now if name.endswith("qkv.weight") or "mask_token" in name or "proj.weight" in name]
    assert drawn and all((now[name] != first_draw[name]).any() for name in drawn), "another draw"
    pictures = edge.views["global"][0]
    with torch.no_grad():
        seen = module.targets(edge).patches
        raw = module.teacher.network(pictures, taps=(2,)).taps["block2"][:, 1:]
    assert_close(seen[0], (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, keepdim=True) + 1e-6).sqrt())


def test_schedules_begin_anew_with_each_stage():
    module, _ = begun(8, lr=Cosine(1.0, 0.0, warmup="2 steps"), **STAGES)
    rates = [module.value_of(module.lr, step) for step in range(8)]
    assert rates[:4] == rates[4:] and rates[0] == 0 and rates[1] == rates[2] == 1.0
    uneven = tiny(stages=(1.0, 3.0))
    uneven.begin(8, 2)
    assert uneven.stage_begins() == [0, 2]
    assert [uneven.value_of(Cosine(1.0, 0.0), step) for step in (2, 5)] == [1.0, 0.5]


def test_published_rates_of_two_stages_of_800_epochs():
    """Epochs 20, 40, 420, just before 800, 800 and 840: half, whole, half, none, none and whole of 2.4e-3. The rise includes
    both its ends, which moves epoch 20 by a thousandth."""
    module = tiny(lr=Cosine(2.4e-3, 0.0, warmup="40 epochs"), **STAGES)
    module.begin(1600 * 100, 100)
    rates = [module.value_of(module.lr, epoch * 100) for epoch in (20, 40, 420, 799.99, 800, 840)]
    expected = [1.2e-3, 2.4e-3, 1.2e-3, 0, 0, 2.4e-3]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_a_run_that_stops_at_an_edge_goes_on_with_the_same_new_student():
    straight, optimizers = begun(6, stages=(1.0, 1.0, 1.0))
    stepped(straight, optimizers, 6)
    first, optimizers = begun(6, stages=(1.0, 1.0, 1.0))
    stepped(first, optimizers, 2)
    torch.manual_seed(99)
    second = build(describe(first))
    second.load_state_dict(first.state_dict())
    resumed = second.train().build_optimizers()
    resumed[0].load_state_dict(optimizers[0].state_dict())
    for step in range(2, 6):
        second.take_step(masked_batch(second, 4, step), resumed)
    ours, theirs = flat_state(second), flat_state(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_skipped_step_at_the_edge_still_ends_the_stage():
    module, optimizers = begun(**STAGES)
    stepped(module, optimizers, 1)
    batch = masked_batch(module, 4, 1)
    batch.views["global"][0, 0, 0, 0, 0] = float("nan")
    assert module.take_step(batch, optimizers).not_finite and module.stage == 1


def test_a_teacher_of_no_blocks_is_its_patch_embedding():
    module, _ = begun(teacher_depth=0)
    batch = masked_batch(module, 2, 0)
    with torch.no_grad():
        model = module.teacher.network.model
        raw = model._pos_embed(model.patch_embed(batch.views["global"][0]))[:, 1:]
        found = module.targets(batch).patches[0]
    assert_close(found, (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, keepdim=True) + 1e-6).sqrt())


def test_a_larger_teacher_of_its_own_is_predicted_in_its_own_width():
    torch.manual_seed(1)
    larger = vit(embed_dim=40, depth=3)
    module = tiny(teacher=larger, stages=(1.0,))
    batch = masked_batch(module, 2, 0)
    assert module.targets(batch).patches.shape == (1, 2, 16, 40)
    assert torch.equal(module.teacher.network.model.patch_embed.proj.weight, larger.model.patch_embed.proj.weight)
    assert run_steps(module, [batch])[0]["features"] > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stages": ()}, "one number above 0"),
        ({"stages": (1.0, 0.0)}, "one number above 0"),
        ({"teacher_depth": 5}, "Use 0 to 2"),
        ({"masks": BlockMasks()}, "Use RandomMasks"),
        ({"teacher": "own", "stages": (1.0, 1.0)}, "Leave one of them out"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    if settings.get("teacher") == "own":
        settings = settings | {"teacher": vit()}
    with pytest.raises(UserError, match=said):
        tiny(**settings)


def test_published_clipping_is_by_the_norm_of_all_gradients():
    assert tiny().clip == Clip(3.0, over="all")
