"""DinoSR: the equations, what stays still when it is frozen, and that padding, slices and processes change nothing."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from lightning_modules.dinosr import DinoSR
from ssd.backbones.speech import LogMelEncoder, SpeechEncoder
from ssd.backbones.vit import ViT
from ssd.batch import Batch, Masks
from ssd.data.sound_samples import masks_of_sounds
from ssd.errors import UserError
from ssd.masking.recipes import SpanMasks
from ssd.schedules import Exponential, Linear
from ssd.views.sound import SoundViews
from tests.contract import MethodContract, flat_state, run_steps, start

RATE_HZ = 8000
NETWORK = {"rate_hz": RATE_HZ, "conv_dim": 16, "embed_dim": 32, "depth": 3, "num_heads": 2}
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0}
VIEWS = SoundViews(
    rate_hz=RATE_HZ,
    global_count=1,
    global_length_s=None,
    local_count=0,
    gain_db=(0.0, 0.0),
    noise_prob=0.0,
    normalize=True,
)


def network(**settings) -> SpeechEncoder:
    return SpeechEncoder(**{**NETWORK, **STILL, **settings})


def tiny(backbone=None, **settings) -> DinoSR:
    torch.manual_seed(0)
    backbone = backbone or network()
    defaults = {"views": VIEWS, "masks": SpanMasks(0.8, 3), "num_codebooks": 2, "num_codes": 8, "lr": 1e-4}
    return DinoSR(backbone, **defaults | {"momentum": 0.9, "freeze_after": 1.0} | settings)


def sounds(lengths, seed: int = 0, padded: int | None = None) -> Batch:
    """Noise of these lengths, padded to the longest or to `padded` samples."""
    width = padded or max(lengths)
    views, valid = torch.zeros(1, len(lengths), width), torch.zeros(1, len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        drawn = torch.randn(length, generator=torch.Generator().manual_seed(1000 * seed + row))
        views[0, row, :length], valid[0, row, :length] = drawn, True
    return Batch({"global": views}, torch.arange(len(lengths)), len(lengths), valid={"global": valid})


def masked(module: DinoSR, batch: Batch, step: int = 0) -> Batch:
    batch.masks["global"] = masks_of_sounds(module.mask_plans()["global"], batch.valid["global"], 0, step, 0)
    return batch


LENGTHS = (1800, 900, 1500, 2400, 1200, 2000, 1100, 1700)


class TestContract(MethodContract):
    """Sounds of unequal lengths."""

    def make(self, **engine):
        return tiny(**engine)

    def batch(self, samples, seed):
        return sounds((LENGTHS * samples)[:samples], seed)


class TestContractOfSpidR(TestContract):
    """A head for each block, and dead codes that are revived after more steps than the contract takes."""

    def make(self, **engine):
        return tiny(**{"heads": "blocks"} | engine)


# ---------------------------------------------------------------- the equations


def test_the_loss_is_the_equation_at_masked_frames_alone():
    module = tiny()
    batch = masked(module, sounds(LENGTHS[:3]))
    masks = batch.masks["global"]
    found = targets_and_loss(module, batch)[1]
    backbone = module.student.backbone
    expected, count = 0.0, 0
    with torch.no_grad():
        for row, length in enumerate(LENGTHS[:3]):
            alone = batch.views["global"][:, row, :length]
            frames = backbone.model.front(alone)
            _, taps = backbone.model.transformer(frames, None, module.taps)
            hidden = masks.boolean[0, row, : frames.shape[1]]
            seen = torch.where(hidden[None, :, None], module.student.mask_token, frames)
            answer, _ = backbone.model.transformer(seen, None)
            for number, tap in enumerate(module.taps):
                raw = taps[tap][0]
                target = ((raw - raw.mean(0)) / (raw.var(0, correction=0) + 1e-5).sqrt())[hidden]
                codes = torch.cdist(target, module.codebooks.centroids[number]).argmin(1)
                logits = module.student.heads[number](answer[0][hidden])
                expected = expected + torch.nn.functional.cross_entropy(logits, codes, reduction="sum") / 2
            count += int(hidden.sum())
    assert_close(found, expected / count, atol=1e-5, rtol=1e-5)


def targets_and_loss(module, batch):
    with torch.no_grad():
        targets = module.targets(batch)
        return targets, module.losses(batch, targets)["codes"]


def test_uniform_heads_pay_the_log_of_the_number_of_codes():
    module = tiny(num_codes=256)
    for head in module.student.heads:
        torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    batch = masked(module, sounds(LENGTHS[:3]))
    assert targets_and_loss(module, batch)[1].item() == pytest.approx(5.545177, abs=1e-5)


def measures_of(rank, world, slices=1):
    module, batch = tiny(micro_batches=slices), masked(tiny(micro_batches=world * slices), sounds(LENGTHS))
    batch = batch.part(rank, world)
    return module.diagnostics(module.take_step(batch, start(module), measure=True))


def test_how_many_codes_are_predicted_is_of_all_hidden_frames_of_a_step(pair):
    """exp of the entropy of their mean prediction, with as many slices and processes as there are; padding does not count."""
    found = measures_of(0, 1)
    module = tiny()
    batch = masked(module, sounds(LENGTHS))
    masks = batch.masks["global"]
    places, real = masks.places()
    with torch.no_grad():
        shares = module.student(batch.seen("global"), masks.boolean[0], places)[real].softmax(-1).mean(0)
    each = (-(shares * shares.log()).sum(-1)).exp()
    for block, value in zip(("block2", "block3"), each.tolist(), strict=True):
        assert found[f"train/codebooks/{block}_predicted_perplexity"] == pytest.approx(value, rel=1e-5)
    assert found["train/codebooks/predicted_perplexity"] == pytest.approx(float(each.mean()), rel=1e-5)
    assert 1 < found["train/codebooks/predicted_perplexity"] < 8
    assert measures_of(0, 1, slices=4) == pytest.approx(found, rel=1e-5)
    for measured in pair.run(measures_of):
        assert measured == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("heads", ["last", "blocks"])
def test_an_utterance_costs_the_same_alone_and_padded_in_a_batch(heads):
    module = tiny(heads=heads)
    alone, beside, longer = sounds((1500,)), sounds((1500, 2600)), sounds((1500,), padded=3300)
    plan = module.mask_plans()["global"]
    for batch in (alone, beside, longer):
        masked(module, batch)
    frames = plan.frames.count(1500)
    hidden = alone.masks["global"].boolean[0, 0]
    assert torch.equal(beside.masks["global"].boolean[0, 0, :frames], hidden)
    assert not beside.masks["global"].boolean[0, 0, frames:].any()
    targets, loss = targets_and_loss(module, alone)
    codes = targets.codes[: int(hidden.sum())]
    others, _ = targets_and_loss(module, beside)
    assert torch.equal(others.codes[: len(codes)], codes)
    assert_close(targets_and_loss(module, longer)[1], loss, atol=1e-6, rtol=1e-6)


def test_each_masked_frame_of_the_step_counts_the_same():
    """Frames of unequal slices: 3 at cost 1 and 1 at cost 5 make 2, not 3."""
    module = tiny()
    batch = masked(module, sounds((1500, 2600)))
    masks = batch.masks["global"]
    boolean = torch.zeros_like(masks.boolean)
    boolean[0, 0, :3], boolean[0, 1, :1] = True, True
    frames = boolean.shape[2]
    flat, weight = torch.tensor([[0, 1, 2, 0], [0, 0, 0, 0]]), torch.tensor([[1.0, 1, 1, 0], [1.0, 0, 0, 0]])
    batch.masks["global"] = Masks(boolean, flat=flat, weight=weight)
    costs = {0: 1.0, 1: 5.0}

    class Says(torch.nn.Module):
        def forward(self, heard, hidden=None, places=None):
            if hidden is None:
                return module_student(heard)
            row = int(heard.valid.sum() > 2000)
            logits = torch.zeros(len(places), 2, 8)
            # the cost of code c where all others are equal: log(7 + e^-x) + x, solved for what is wanted
            right = torch.nn.functional.one_hot(targets_codes[row], 8)
            wanted = costs[row]
            low = math.log(math.expm1(wanted) / 7)
            return logits - low * right

    with torch.no_grad():
        targets = module.targets(batch)
    module_student, targets_codes = module.student, targets.codes.unflatten(0, (2, 4))
    module.student = Says()
    assert frames > 3 and int(targets.masked) == 4
    total = sum(module.losses(batch.part(n, 2), targets.part(n, 2))["codes"] for n in range(2))
    assert_close(total, torch.tensor(2.0), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- order and memory


def test_a_step_assigns_with_the_codes_as_they_were_and_moves_them_once():
    module = tiny(micro_batches=2)
    optimizers = start(module)
    batch = masked(module, sounds(LENGTHS[:4]))
    with torch.no_grad():
        targets = module.targets(batch)
    before = copy.deepcopy(module.codebooks)
    module.take_step(batch, optimizers)
    before.update(targets.sums, targets.counts)
    assert torch.equal(module.codebooks.sums, before.sums) and torch.equal(module.codebooks.counts, before.counts)
    assert targets.counts.sum(1).tolist() == [float(targets.masked)] * 2


def test_looking_changes_no_code():
    module = tiny().eval()
    before = flat_state(module)
    batch = masked(module, sounds(LENGTHS[:3]))
    module.begin(4, 2)
    targets_and_loss(module, batch)
    module.validation_step(
        {
            "sample": batch.views["global"][0],
            "valid": batch.valid["global"][0],
            "label": batch.index,
            "index": batch.index,
        },
        0,
    )
    assert all(torch.equal(before[name], value) for name, value in flat_state(module).items())


def test_positions_of_the_teacher_are_copied_and_the_rest_is_averaged():
    module = tiny(lr=1e-2, momentum=0.75)
    start_of = flat_state(module.teacher.network)
    run_steps(module, [masked(module, sounds(LENGTHS[:3]))])
    student = module.student.backbone.model.transformer.state_dict()
    for name, value in module.teacher.network.state_dict().items():
        if name.startswith("positions."):
            assert torch.equal(value, student[name]) and not torch.equal(value, start_of[name])
        else:
            assert_close(value, 0.75 * start_of[name] + 0.25 * student[name], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"freeze_after": 0.25}, {"momentum": Exponential(0.9, 1.0, scale="1 steps", reached=0.02)}]
)
def test_what_is_frozen_moves_by_no_bit_and_the_rest_goes_on(settings):
    """Weight decay moves what has no gradient, and moments what had one."""
    module = tiny(lr=1e-2, weight_decay=0.1, **settings)
    module.train()
    module.begin(14, 7)
    optimizers = module.build_optimizers()
    frozen_at, before = None, None
    for step in range(14):
        if module.frozen and frozen_at is None:
            frozen_at, before = step, flat_state(module)
        module.take_step(masked(module, sounds(LENGTHS[:3], step)), optimizers)
    assert frozen_at is not None and 1 <= frozen_at <= 4
    still = ("student.backbone.model.front.", "teacher.")
    after = flat_state(module)
    for name in before:
        if name.startswith(still):
            assert torch.equal(before[name], after[name]), name
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("transformer.blocks" in name for name in moved) and {"codebooks.sums", "mask_token"} & set(
        name.removeprefix("student.") for name in moved
    )


def test_published_momentum_at_the_counts_of_the_paper():
    module = tiny(momentum=Linear(0.999, 0.9999, until="30000 steps", reaches_end=False), freeze_after="200000 steps")
    module.begin(400_000, 1000)
    assert [module.value_of(module.momentum, j) for j in (0, 15_000, 30_000)] == pytest.approx([0.999, 0.99945, 0.9999])
    # the update behind step j - 1 is the one with count j
    module.step = 199_999
    assert not module.frozen
    module.step = 200_000
    assert module.frozen


def test_dropped_blocks_leave_no_parameter_without_a_gradient():
    module = tiny(network(layer_drop=0.9), heads="blocks")
    module.train()
    batch = masked(module, sounds(LENGTHS[:3]))
    with torch.no_grad():
        targets = module.targets(batch)
    module.losses(batch, targets)["codes"].backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_the_teacher_drops_nothing_while_the_student_trains():
    module = tiny(network(dropout=0.5, attention_dropout=0.5, layer_drop=0.5)).train()
    batch = masked(module, sounds(LENGTHS[:3]))
    with torch.no_grad():
        first, second = (module.targets(batch).sums for _ in range(2))
    assert torch.equal(first, second)


def test_dead_codes_begin_anew_where_it_is_asked_for():
    settings = {"num_codes": 64, "lr": 0.0}
    kept, revived = tiny(**settings), tiny(revive_after=2, **settings)
    for module in (kept, revived):
        run_steps(module, [masked(module, sounds(LENGTHS[:3]), step) for step in range(4)])
    assert (kept.codebooks.idle == 4).any() and not (revived.codebooks.idle >= 2).any()


# ---------------------------------------------------------------- settings


def test_a_spectrogram_will_do():
    backbone = LogMelEncoder(rate_hz=RATE_HZ, mels=16, patch=(2, 16), embed_dim=32, depth=2, num_heads=2)
    module = tiny(backbone)
    assert run_steps(module, [masked(module, sounds(LENGTHS[:3]))])[0]["codes"] > 0


def test_cropped_to_the_shortest_all_hide_as_many_frames():
    views = SoundViews(rate_hz=RATE_HZ, global_count=1, local_count=0, global_length_s=1.0, crop_to_shortest=True)
    module = tiny(views=views)
    batch = masked(module, sounds((1600,) * 4))
    counts = batch.masks["global"].boolean.sum(-1)
    assert batch.masks["global"].masked is not None and (counts == counts[0, 0]).all()
    assert run_steps(module, [batch])[0]["codes"] > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_codebooks": 4}, "Use 1 to 3"),
        ({"heads": "first"}, "'last' or 'blocks'"),
        ({"num_codes": 0}, "Use 1 or more"),
        ({"codebook_momentum": 1.0}, "codebook_momentum"),
        ({"revive_after": 0}, "Use null"),
        ({"freeze_after": 1.5}, "share of the run"),
        ({"views": "dino"}, "Use the recipe 'utterance'"),
        ({"views": "speech"}, "one view of each sound"),
        ({"views": "utterance"}, "Set both rate_hz alike"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        tiny(**settings)


def test_networks_of_pictures_and_patches_of_some_bands_are_refused():
    for backbone in (
        ViT("vit_tiny_patch16_224", arguments={"embed_dim": 32, "depth": 1, "num_heads": 2}),
        LogMelEncoder(rate_hz=RATE_HZ, embed_dim=32, depth=2, num_heads=2),
    ):
        with pytest.raises(UserError, match="one token for each moment"):
            tiny(backbone, num_codebooks=1)


def test_a_sound_without_a_frame_is_named():
    module = tiny()
    with pytest.raises(UserError, match="sees 240"):
        masked(module, sounds((1500, 200)))
