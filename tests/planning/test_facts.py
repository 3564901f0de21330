"""What settings come to, beside a real step and what can be said by hand."""

import math

import pytest

from lightning_modules.data2vec import Data2Vec
from lightning_modules.data2vec2 import Data2Vec2
from lightning_modules.dbot import DBOT
from lightning_modules.dino import DINO
from lightning_modules.dinov2 import DINOv2
from lightning_modules.dinov3 import DINOv3
from lightning_modules.dmjd import DMJD
from lightning_modules.franca import Franca
from lightning_modules.ibot import IBOT
from lightning_modules.mae import MAE
from lightning_modules.random_teacher import RandomTeacher
from ssd.backbones.base import Backbone
from ssd.backbones.vit import ViT
from ssd.errors import UserError
from ssd.masking.recipes import BlockMasks, DisjointMasks
from ssd.planning.facts import curve, facts_of, half_life
from ssd.planning.rules import warned
from ssd.schedules import Cosine, Linear
from ssd.views.recipes import CropViews, MixedDINOViews
from tests.lightning_modules import test_capi
from tests.lightning_modules.runs import convnet, digits, vit

EPOCHS = 10
SETTINGS: dict[type, dict] = {
    DINO: {},
    IBOT: {},
    DINOv2: {"koleo_group": 16, "shared_head": False},
    DINOv3: {"koleo_group": 16},
    Franca: {"koleo_group": 16, "levels": 2, "num_prototypes": 48},
    RandomTeacher: {"num_prototypes": 32},
}


def planned(module, processes=1, epochs=EPOCHS, **data):
    samples = digits(**data)
    samples.prepare(module.views, module.mask_plans())
    facts = facts_of(module, samples, processes=processes, max_epochs=epochs, precision="32-true")
    return facts, samples


def encoded_in_a_step(module, batch) -> dict[str, int]:
    """Tokens that pass the blocks of the student's and the teacher's backbone in one step."""
    counts = {"student": 0, "teacher": 0}

    def count(network):
        def hook(part, inputs, tokens):
            kept = [tokens.patches, tokens.registers, None if tokens.cls is None else tokens.cls[:, None]]
            counts[network] += sum(part.shape[0] * part.shape[1] for part in kept if part is not None)

        return hook

    module.train()
    hooks = [
        part.register_forward_hook(count(name))
        for name, network in (("student", module.student), ("teacher", module.teacher))
        for part in network.modules()
        if isinstance(part, Backbone)
    ]
    module.take_step(batch, module.build_optimizers())
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("method", SETTINGS, ids=lambda method: method.__name__)
def test_tokens_are_those_that_pass_the_networks_in_a_step(method):
    module = vit(method, **SETTINGS[method])
    facts, data = planned(module)
    module.begin(facts.steps, facts.steps_per_epoch)
    counts = encoded_in_a_step(module, next(iter(data.train_dataloader())))
    assert counts == {"student": facts.tokens("student"), "teacher": facts.tokens("teacher")}


REGRESSION = {
    MAE: {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    DBOT: {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    DMJD: {"cell": 4, "masks": DisjointMasks(0.6), "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    Data2Vec: {"masks": BlockMasks(ratio=(0.6, 0.6), share=1.0, smallest=2), "top_blocks": 1},
    Data2Vec2: {"num_masks": 5, "top_blocks": 1, "decoder_dim": 24, "decoder_depth": 1, "decoder_groups": 4},
}


@pytest.mark.parametrize("method", REGRESSION, ids=lambda method: method.__name__)
def test_visible_tokens_are_counted_under_every_mask_and_no_teacher_encodes_none(method):
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}
    backbone = ViT("vit_tiny_patch16_224", img_size=16, in_chans=1, arguments=arguments)
    module = method(backbone, views=CropViews(size=16), **REGRESSION[method])
    facts, data = planned(module)
    module.begin(facts.steps, facts.steps_per_epoch)
    batch = next(iter(data.train_dataloader()))
    counts = encoded_in_a_step(module, batch)
    assert counts == {"student": facts.tokens("student"), "teacher": facts.tokens("teacher")}
    if method is not Data2Vec:  # of blocks the number that is hidden varies
        assert facts.masked_tokens() == batch.masks["global"].boolean.sum()


def test_places_of_a_convnet_are_counted_as_they_pass():
    module = convnet()
    facts, data = planned(module)
    module.begin(facts.steps, facts.steps_per_epoch)
    counts = encoded_in_a_step(module, next(iter(data.train_dataloader())))
    assert counts == {"student": facts.tokens("student"), "teacher": facts.tokens("teacher")}


def test_the_masked_patches_of_a_step_are_those_that_are_drawn_on_average():
    facts, data = planned(vit(DINOv2, koleo_group=16), batch_size=80)
    drawn = [batch.masks["global"].boolean for batch in data.train_dataloader()]
    masks = facts.masked["global"]
    assert masks.tokens == drawn[0].shape[-1] == 4
    assert facts.masked_tokens() == pytest.approx(sum(part.sum().item() for part in drawn) / len(drawn), rel=0.05)
    # of so few patches a tenth is none: fewer crops than the recipe's half have anything masked
    whole = [(~part.any(-1)).float().mean().item() for part in drawn]
    assert masks.whole == pytest.approx(sum(whole) / len(whole), abs=0.03)


def test_two_processes_halve_the_steps_and_double_a_rate_by_the_linear_rule():
    alone, _ = planned(convnet(lr=1e-3, lr_rule="linear", lr_reference_batch=16))
    both, _ = planned(convnet(lr=1e-3, lr_rule="linear", lr_reference_batch=16), processes=2)
    assert (alone.steps_per_epoch, both.steps_per_epoch) == (10, 5)
    assert (alone.step_batch, both.step_batch) == (16, 32)
    assert alone.samples_seen == both.samples_seen == EPOCHS * 160
    assert alone.curves["lr"].highest == pytest.approx(1e-3)
    assert both.curves["lr"].highest == pytest.approx(2e-3)
    assert both.tokens("student") == 2 * alone.tokens("student"), "tokens are those of the whole step"


def test_a_length_in_steps_counts_before_epochs():
    facts, _ = planned(convnet(steps=37), epochs=None)
    assert (facts.steps, facts.epochs) == (37, 3.7)


def test_samples_that_fill_no_step_are_refused():
    with pytest.raises(UserError, match=r"160 training samples do not fill one step of 320 \(16 on each of 20"):
        planned(convnet(), processes=20)


def test_a_curve_has_the_values_of_its_schedule_and_the_length_of_its_rise():
    lr = Cosine(1.0, 0.1, warmup=0.1)
    found = curve(lr, 500, 50)
    assert (found.start, found.rise, found.highest) == (0.0, 50, 1.0)
    assert found.end == lr.value(499, 500, 50)
    assert found.steps == tuple(range(500))
    assert found.values[123] == lr.value(123, 500, 50)
    assert curve(0.3, 500, 50).row() == {"start": 0.3, "end": 0.3, "highest": 0.3, "lowest": 0.3, "rise": 0}
    assert curve(Linear(0.04, 0.07, until="30 epochs"), 5000, 50).rise == 1500
    late = curve(Linear(0.0, 1.0, until=0.5, after="100 steps"), 300, 50)
    assert late.rise == 200, "what comes after a wait is a share of what is left"


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    found = curve(Linear(0.0, 1.0), 100_000, 1000)
    assert len(found.steps) == len(found.values) == 1000
    assert (found.steps[0], found.steps[-1], found.end) == (0, 99_999, 1.0)


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.5), (10, 0.5**0.1), (173, 0.996)])
def test_half_of_an_average_is_newer_after_its_half_life(steps, momentum):
    assert half_life(momentum) == pytest.approx(steps, rel=1e-3)
    assert momentum ** half_life(momentum) == pytest.approx(0.5)


def test_an_average_that_keeps_all_or_nothing():
    assert half_life(1.0) == math.inf
    assert half_life(0.0) == 0


def test_rates_of_groups_are_those_of_layer_decay():
    facts, _ = planned(vit(DINOv2, koleo_group=16, layer_decay=0.9, patch_embed_lr_scale=0.2))
    # two blocks: what comes before them learns at .9^3, the patch embedding at a fifth of that
    assert min(facts.lr_scales.values()) == pytest.approx(0.2 * 0.9**3)
    assert facts.lr_scales["backbone.model.cls_token"] == pytest.approx(0.9**3)
    assert max(facts.lr_scales.values()) == 1


def test_parameters_and_prototypes_are_counted_once():
    module = vit(DINOv2, koleo_group=16)
    facts, _ = planned(module)
    assert facts.prototypes == {"head.head.last_layer": 32}
    assert facts.parameters["student"] == sum(p.numel() for p in module.student.parameters())
    # the mask token belongs to neither, and the teacher has none
    token = facts.parameters["student"] - facts.parameters["backbone"] - facts.parameters["head"]
    assert token == facts.parameters["student"] - facts.parameters["teacher"] == module.student.mask_token.numel()
    assert facts.trainable == sum(p.numel() for p in module.student.parameters() if p.requires_grad)
    apart, _ = planned(vit(DINOv2, koleo_group=16, shared_head=False, num_patch_prototypes=16))
    assert sorted(apart.prototypes.values()) == [16, 32]


def test_pictures_tell_how_many_of_their_pixels_the_smallest_crop_shows():
    facts, _ = planned(convnet())
    assert facts.picture_px == 8
    assert facts.views["local"].smallest_side_px == pytest.approx(8 * math.sqrt(0.05))


def test_a_run_that_begins_with_the_networks_of_another_is_a_stage():
    assert planned(convnet(start_from="a.ckpt"))[0].stage
    assert not planned(convnet())[0].stage


def test_tokens_of_views_that_change_their_size_are_those_of_a_step_on_average():
    sizes = ((16, 8, 1.0), (32, 8, 3.0))
    views = MixedDINOViews(sizes=sizes, global_size=16, local_count=1, local_size=8)
    facts, data = planned(vit(DINO, views=views, lr=1e-4))
    assert facts.sizes_change and facts.views["global"].sizes == (16, 32)
    drawn = [views.at(data.seed, step).kinds()["global"][0].size for step in range(500)]
    mean = sum((size // 8) ** 2 + 1 for size in drawn) / len(drawn)
    assert facts.tokens("teacher") == pytest.approx(2 * 16 * mean, abs=1)
    assert not planned(convnet())[0].sizes_change


@pytest.mark.parametrize(("positionwise", "rows"), [(True, 16), (False, 16 * 16)])
def test_targets_of_patches_are_counted_as_patches_and_a_teacher_that_waits_by_when_it_follows(positionwise, rows):
    module = test_capi.small(positionwise=positionwise, num_prototypes=4096)
    facts, _ = planned(module, batch_size=16)
    assert facts.targets_of_patches and facts.sinkhorn and facts.target_rows == rows
    # of 16 patches 10 are hidden, beside four registers
    assert (facts.tokens("student"), facts.tokens("teacher")) == (16 * (6 + 4), 16 * (16 + 4))
    assert facts.momentum_half_life == pytest.approx(half_life(0.999), rel=1e-2)
    assert facts.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert facts.lr_scales["backbone.model.patch_embed.weight"] == 0.2
    found = {warning.setting for warning in warned(facts)}
    assert ("target_rule" in found) == positionwise and "num_prototypes" not in found
