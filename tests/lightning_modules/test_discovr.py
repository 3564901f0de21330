import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_modules.discovr import DISCOVR, frames_of
from ssd.backbones.video import VideoViT
from ssd.backbones.vit import ViT
from ssd.batch import Batch, Targets
from ssd.decoders import MaskedDecoder
from ssd.errors import UserError
from ssd.losses.prototype import cross_view_cross_entropy, token_cross_entropy
from ssd.masking.recipes import BlockMasks, RandomMasks
from ssd.normalisers import standardised_over_patches
from ssd.optim import decays_unless_bias_or_1d
from ssd.schedules import Cosine, Linear
from ssd.targets import Centering, sinkhorn_knopp
from ssd.views.clips import ClipViews
from ssd.views.recipes import RECIPES
from tests.contract import MethodContract, start

VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
PLAIN = "vit_tiny_patch16_224"
FRAMES = 4
SMALL = {
    "num_prototypes": 32, "num_clusters": 12, "num_masks": 2, "head_hidden_dim": 16, "head_bottleneck_dim": 8,
    "decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2, "masks": RandomMasks(0.5, tube=True),
    "teacher_temperature": 0.04,
}  # fmt: skip


def views(**settings) -> ClipViews:
    still = {"flip": 0.0, "jitter_prob": 0.0, "grey_prob": 0.0, "blur_prob": (0.0, 0.0)}
    return ClipViews(
        **{"global_count": 1, "global_size": 16, "global_frames": FRAMES, "local_count": 0, **still, **settings}
    )


def tiny(**settings) -> DISCOVR:
    torch.manual_seed(0)
    backbone = VideoViT(PLAIN, arguments=VIT)
    image_backbone = ViT(PLAIN, img_size=16, fixed_positions=True, arguments={**VIT, "embed_dim": 20})
    return DISCOVR(backbone, image_backbone, **{"views": views(), "lr": 1e-4, "lr_rule": "none", **SMALL} | settings)


def random_batch(samples: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    clips = {"global": torch.randn(1, samples, 3, FRAMES, 16, 16, generator=generator)}
    return Batch(views=clips, index=torch.arange(samples), total=samples)


def masked_batch(module: DISCOVR, samples: int, seed: int) -> Batch:
    batch = random_batch(samples, seed)
    for number, (name, plan) in enumerate(module.mask_plans().items()):
        batch.masks[name] = plan.draw(samples, 0, seed, number)
    return batch


class TestContract(MethodContract):
    """Biases of keys have no gradient but what rounding leaves, which Adam makes steps of: they are kept small."""

    def make(self, **engine):
        moving = {"teacher_temperature": Linear(0.04, 0.07, until="2 epochs", every="epoch"), "lr": 1e-5}
        return tiny(**moving | engine)

    def batch(self, samples, seed):
        return random_batch(samples, seed)


def test_the_released_form_in_slices_is_the_whole_batch():
    forms = {"hard_assignments": True, "prototypes_from_both": False, "image_frame_step": 3, "lr": 1e-5}
    whole, sliced = tiny(**forms), tiny(micro_batches=2, **forms)
    batch = masked_batch(whole, 4, 0)
    expected, found = (module.take_step(batch, start(module)).terms for module in (whole, sliced))
    assert found == pytest.approx(expected, abs=1e-5)
    for ours, theirs in zip(sliced.parameters(), whole.parameters(), strict=True):
        assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------------- what is paired with what


def test_a_token_of_a_clip_is_paired_with_its_place_in_the_first_frame_of_its_tube():
    """T = 4 frames of n = 3 places: (0,0) (0,1) (0,2) (2,0) (2,1) (2,2), not every second of twelve tokens."""
    module = tiny()
    assert module.paired == [0, 2] and module.judged == module.shown == [0, 1, 2, 3]
    places = torch.tensor([[[time, place] for place in range(3)] for time in range(4)])[:, None]  # (F, 1, n, 2)
    paired = places[module.paired].transpose(0, 1).flatten(1, 2)[0]
    assert paired.tolist() == [[0, 0], [0, 1], [0, 2], [2, 0], [2, 1], [2, 2]]


def test_targets_are_the_image_teachers_patches_of_those_frames_in_the_order_of_tokens():
    module = tiny(image_frame_step=3)
    assert module.judged == [0, 3] and module.shown == [0, 2, 3]
    batch = masked_batch(module, 2, 0)
    with torch.no_grad():
        targets = module.targets(batch)
        network = module.teacher.network
        for sample in range(2):
            expected = []
            for frame in (0, 2):
                patches = network.image_backbone(batch.views["global"][0, sample : sample + 1, :, frame]).patches[0]
                expected.append((patches - patches.mean(0)) / (patches.std(0) + 1e-6))
            expected = torch.cat(expected)
            expected = expected / expected.norm(dim=1, keepdim=True)
            assert_close(targets.patches[0, sample], expected, atol=1e-5, rtol=1e-4)
        head = network.image_head(network.image_backbone(batch.views["global"][0, :, :, 3]).pooled()).logits()
        assert_close(targets.image_probs[1], torch.softmax(head / 0.04, -1), atol=1e-5, rtol=1e-4)


def test_decoded_tokens_lie_in_the_order_of_their_targets():
    """A decoder that changes nothing, of tokens that say their own place: every visible one is found at its place."""
    decoder = MaskedDecoder(1, 1, dim=8, depth=1, num_heads=1, has_cls=False)
    decoder.embed = torch.nn.Linear(1, 8)
    with torch.no_grad():
        decoder.embed.weight.zero_()
        decoder.embed.weight[7] = 1.0  # no position reaches the last number of a width of 8 over 3 axes
        decoder.embed.bias.zero_()
        decoder.mask_token.zero_()
    decoder.blocks, decoder.norm, decoder.head = torch.nn.ModuleList(), torch.nn.Identity(), torch.nn.Identity()
    visible = torch.tensor([[1, 4, 6, 7], [0, 2, 3, 5]])
    said = decoder(1.0 + visible[..., None].float(), visible, (2, 2, 2))[..., 7]
    for row, places in enumerate(visible.tolist()):
        assert said[row].tolist() == [place + 1 if place in places else 0 for place in range(8)]


def test_masks_are_the_decoders_first_then_those_of_the_heads_and_of_every_frame():
    module = tiny(image_frame_step=2)
    plans = module.mask_plans()
    assert plans["global"].draw(3, 0).visible.shape == (1 + 2, 3, 2 * 2), "2 of 4 places at 2 times"
    assert plans["frames"].draw(3, 0).visible.shape == (2 * 2, 3, 2), "2 masks of 2 frames"
    published = VideoViT(PLAIN, arguments={**VIT, "patch_size": 16}).grid(64, 112, 112)
    assert published == (32, 7, 7)
    drawn = RandomMasks(0.9, tube=True).draw(1, 2, (1, 7, 7), 0)
    assert (drawn.sum(2) == 44).all(), "44 of 49 patches of a frame"


def test_the_decoder_answers_from_its_own_mask_alone():
    module = tiny()
    batch = masked_batch(module, 2, 0)
    visible = batch.masks["global"].visible
    with torch.no_grad():
        alone = module.student(batch.views["global"], visible[:1])
        frames, hidden = (
            frames_of(batch.views["global"], module.judged),
            batch.masks["frames"].visible.unflatten(0, (2, 4)),
        )
        together = module.student(batch.views["global"], visible, frames, hidden)
    assert alone.clips is None and alone.frames is None
    assert_close(alone.tokens, together.tokens, atol=1e-5, rtol=1e-4)
    assert together.clips.features.shape == (2, 2, 8) and together.frames.features.shape == (2, 4, 2, 8)


# ---------------------------------------------------------------------- losses


def losses_of(module: DISCOVR, batch: Batch) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        targets = module.targets(batch)
    return module.losses(batch, targets)


def test_the_losses_are_the_equations_sample_by_sample():
    module = tiny(num_masks=2)
    with torch.no_grad():
        module.center.center.normal_()
        module.image_center.center.normal_()
    batch = masked_batch(module, 3, 1)
    clips, network, student = batch.views["global"][0], module.teacher.network, module.student
    shown, of_frames = batch.masks["global"].visible, batch.masks["frames"].visible
    video, image = [], []

    def cross_entropy(p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return -(p * torch.log_softmax(logits / 0.1, -1)).sum(-1)

    with torch.no_grad():
        for b in range(3):
            clip = clips[b : b + 1]
            p = torch.softmax((network.head(network.backbone(clip).cls).logits() - module.center.center) / 0.04, -1)
            for mask in (1, 2):
                said = student.head(student.backbone(clip, visible=shown[mask, b : b + 1]).cls).logits()
                video.append(cross_entropy(p, said))
            for frame in range(FRAMES):
                picture = clip[:, :, frame]
                logits = network.image_head(network.image_backbone(picture).cls).logits()
                p = torch.softmax((logits - module.image_center.center) / 0.04, -1)
                for mask in range(2):
                    places = of_frames[mask * FRAMES + frame, b : b + 1]
                    said = student.image_head(student.image_backbone(picture, visible=places).cls).logits()
                    image.append(cross_entropy(p, said))
        found = losses_of(module, batch)
    assert_close(found["video"], torch.cat(video).mean(), atol=1e-5, rtol=1e-4)
    assert_close(found["image"], torch.cat(image).mean(), atol=1e-5, rtol=1e-4)


def test_scd_is_the_swapped_prediction_of_assignments_over_all_tokens_of_the_batch():
    module = tiny()
    batch = masked_batch(module, 3, 1)
    with torch.no_grad():
        targets = module.targets(batch)
        tokens = module.student(batch.views["global"], batch.masks["global"].visible[:1]).tokens
        prototypes = module.student.clusters.weight
        s_v = (F.normalize(tokens, dim=-1) @ prototypes.T).flatten(0, 1)  # (B N, K')
        s_i = (targets.patches[0] @ prototypes.T).flatten(0, 1)

        def assigned(scores):  # as the paper writes it: rows are prototypes, columns tokens
            table = torch.exp(scores / 0.05).double().T
            table = table / table.sum()
            for _ in range(10):
                table = table / table.sum(1, keepdim=True) / table.shape[0]
                table = table / table.sum(0, keepdim=True) / table.shape[1]
            return (table / table.sum(0, keepdim=True)).T.float()

        def cross_entropy(scores, target):
            return -(target * torch.log_softmax(scores / 0.1, -1)).sum(-1).mean()

        expected = cross_entropy(s_v, assigned(s_i)) + cross_entropy(s_i, assigned(s_v))
        assert_close(targets.patch_probs.flatten(0, 2), assigned(s_i), atol=1e-5, rtol=1e-3)
        assert_close(module.losses(batch, targets)["scd"], expected, atol=1e-5, rtol=1e-4)


def test_the_loss_of_frames_is_the_same_in_slices_of_any_size():
    module = tiny()
    batch = masked_batch(module, 4, 0)
    with torch.no_grad():
        targets = module.targets(batch)
        whole = module.losses(batch, targets)
        for slices in (2, 4):
            parts = [module.losses(batch.part(n, slices), targets.part(n, slices)) for n in range(slices)]
            for name, value in whole.items():
                assert_close(sum(part[name] for part in parts), value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("both", [True, False])
def test_scd_teaches_the_clips_network_and_the_prototypes_and_never_the_network_of_frames(both):
    module = tiny(prototypes_from_both=both)
    batch = masked_batch(module, 3, 0)
    losses_of(module, batch)["scd"].backward()
    for name, parameter in module.student.named_parameters():
        if name.startswith("image_"):
            assert parameter.grad is None or not parameter.grad.any(), name
    assert module.student.clusters.weight.grad.any()
    assert any(p.grad is not None and p.grad.any() for p in module.student.backbone.parameters())


def test_the_frames_term_teaches_the_prototypes_in_the_form_of_the_paper_alone():
    """With decoded tokens that say nothing of prototypes the first term gives them no gradient."""
    gradients = {}
    for both in (True, False):
        module = tiny(prototypes_from_both=both)
        batch = masked_batch(module, 3, 0)
        with torch.no_grad():
            targets = module.targets(batch)
        tokens = torch.zeros(3, 8, 20)
        prototypes = module.student.clusters()
        module.cluster_loss(tokens, prototypes, targets).backward()
        gradients[both] = module.student.clusters.weight.grad
    assert gradients[True].abs().sum() > 0.1 and not gradients[False].any()


def test_hard_assignments_are_ones_at_the_largest_soft_ones():
    soft, hard = tiny(), tiny(hard_assignments=True)
    batch = masked_batch(soft, 3, 0)
    with torch.no_grad():
        a, b = soft.targets(batch).patch_probs, hard.targets(batch).patch_probs
    assert torch.equal(b, F.one_hot(a.argmax(-1), 12).float()) and ((a > 0.01) & (a < 0.99)).any()


def test_prototypes_are_of_unit_length_after_every_step_and_all_are_in_use():
    module = tiny(lr=1e-2)
    optimizers = start(module)
    report = module.take_step(masked_batch(module, 4, 0), optimizers, measure=True)
    assert_close(module.student.clusters.weight.norm(dim=1), torch.ones(12))
    assert report.uses["patch"].num_prototypes == 12 and report.uses["patch"].perplexity > 10
    assert report.uses["picture"].num_prototypes == 32


# ---------------------------------------------------------------------- numbers by hand


def test_sinkhorn_of_two_tokens_and_two_prototypes():
    scores = torch.tensor([[1.0, 0.0], [0.9, 0.0]])
    many, one = (sinkhorn_knopp(scores, 0.05, rounds) for rounds in (10, 1))
    share = math.e / (1 + math.e)
    assert_close(many, torch.tensor([[share, 1 - share], [1 - share, share]]), atol=1e-5, rtol=0)
    assert_close(one, torch.tensor([[0.637890, 0.362110], [0.192510, 0.807490]]), atol=1e-5, rtol=0)
    assert_close(sinkhorn_knopp(torch.eye(2), 0.05, 10)[0, 1], torch.tensor(2.06e-9), atol=1e-11, rtol=0)
    assert_close(sinkhorn_knopp(torch.ones(5, 3), 0.05, 10), torch.full((5, 3), 1 / 3))


def test_scores_of_one_stay_finite_in_half_precision():
    """exp(1 / 0.05) = 4.85e8 is beyond half precision."""
    module = tiny()
    batch = masked_batch(module, 2, 0)
    features = torch.ones(2, 8, 20).half() / math.sqrt(20)
    prototypes = torch.ones(12, 20).half() / math.sqrt(20)
    assert module.assigned(features.float(), prototypes).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        terms = losses_of(module, batch)
    assert all(term.isfinite() for term in terms.values())
    whole = losses_of(module, batch)
    for name, term in terms.items():
        assert_close(term.float(), whole[name], atol=0.02, rtol=0.02)


def test_worked_cross_entropies():
    uniform = torch.zeros(1, 1, 16_384), torch.full((1, 1, 16_384), 1 / 16_384)
    assert float(cross_view_cross_entropy(*uniform, 0.1, skip_same_view=False)) == pytest.approx(9.704061, abs=1e-5)
    assert float(token_cross_entropy(torch.zeros(1, 3000), torch.full((1, 3000), 1 / 3000), 0.1)) == pytest.approx(
        8.006368, abs=1e-5
    )
    logits = torch.tensor([[[0.1, 0.0]]])
    target = Centering(2)(logits, 0.04)
    assert float(target[0, 0, 0]) == pytest.approx(0.924142, abs=1e-6)
    found = cross_view_cross_entropy(logits, target, 0.1, skip_same_view=False)
    assert float(found) == pytest.approx(0.389120, abs=1e-6)
    hard = torch.eye(2)
    found = token_cross_entropy(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), hard, 0.1)
    assert found.tolist() == pytest.approx([4.54e-5, 10.000045], abs=1e-6)


def test_patches_are_standardised_by_the_unbiased_deviation():
    assert standardised_over_patches(torch.tensor([[[1.0], [2.0], [3.0]]])).flatten().tolist() == pytest.approx(
        [-1, 0, 1]
    )
    with pytest.raises(ValueError, match="two or more"):
        standardised_over_patches(torch.zeros(1, 1, 3))


def test_both_centres_are_means_of_logits_and_not_of_softmaxed_ones():
    """Logits [[2, 0], [4, 0]], centre 0, momentum 0.9 -> [0.3, 0]."""
    module = tiny(num_prototypes=2)
    logits = torch.tensor([[[2.0, 0.0], [4.0, 0.0]]])
    module.update(Targets(logits=logits, image_logits_mean=logits.mean(1)))
    assert_close(module.center.center, torch.tensor([0.3, 0.0]))
    assert_close(module.image_center.center, torch.tensor([0.3, 0.0]))


def test_the_centre_of_frames_follows_all_frames_of_the_step():
    module = tiny(center_momentum=0.0)
    batch = masked_batch(module, 3, 0)
    optimizers = start(module)
    network = module.teacher.network
    with torch.no_grad():
        pictures = frames_of(batch.views["global"], module.judged).flatten(0, 1)
        expected = network.image_head(network.image_backbone(pictures).pooled()).logits().mean(0)
    module.take_step(batch, optimizers)
    assert_close(module.image_center.center, expected, atol=1e-5, rtol=1e-4)


def test_teachers_follow_behind_the_step_by_a_constant_share():
    module = tiny(lr=1e-2)
    optimizers = start(module)
    before = {name: value.clone() for name, value in module.teacher.network.named_parameters()}
    module.take_step(masked_batch(module, 4, 0), optimizers)
    after, students = dict(module.teacher.network.named_parameters()), dict(module.student.named_parameters())
    for name, old in before.items():
        assert_close(after[name], 0.99 * old + 0.01 * students[name], atol=1e-6, rtol=1e-4)
    value = 0.0
    shares = []
    for _ in range(100):
        value = 0.99 * value + 0.01
        shares.append(value)
    assert [shares[0], shares[9], shares[99]] == pytest.approx([0.01, 0.0956, 0.6340], abs=1e-4)


def test_schedules_reach_the_optimiser_and_epochs_beyond_400():
    module = tiny(lr=Cosine(1.5e-4, 1e-6, warmup="2 epochs"), lr_rule="linear")
    module.begin(500 * 3, 3)
    optimizers = module.build_optimizers()
    for step in (0, 5, 1499):
        module.step = step
        module.take_step(masked_batch(module, 2, step), optimizers)
        factor = 2 / 256
        expected = module.lr.scaled(factor).value(step, 1500, 3)
        assert [group["lr"] for group in optimizers[0].param_groups] == pytest.approx([expected] * 3)
    temperature = Linear(0.04, 0.07, until="30 epochs", every="epoch")
    values = [temperature.value(epoch * 10, 4000, 10) for epoch in (0, 15, 29, 100)]
    assert values == pytest.approx([0.04, 0.0555172, 0.07, 0.07], abs=1e-7)
    peaks = [Cosine(1.5e-4, 0.0).scaled(batch / 256).start for batch in (48, 16)]
    assert peaks == pytest.approx([2.8125e-5, 9.375e-6])


def test_class_and_mask_tokens_are_where_the_rule_says():
    module = tiny()
    groups = {id(p): group["decays"] for group in module.build_optimizers()[0].param_groups for p in group["params"]}
    for name, parameter in module.student.named_parameters():
        if parameter.requires_grad:
            assert groups[id(parameter)] == (parameter.ndim > 1 and not name.endswith(".bias")), name
            assert groups[id(parameter)] == decays_unless_bias_or_1d(name, parameter)


def test_a_term_of_weight_0_moves_nothing_of_its_own():
    module = tiny(scd_weight=0.0, weight_decay=0.0, lr=1e-2)
    before = module.student.clusters.weight.clone()
    module.take_step(masked_batch(module, 2, 0), start(module))
    assert_close(module.student.clusters.weight, before)


def test_the_recipe_shows_clips_as_they_are():
    (view,) = RECIPES["clip_crop"].kinds()["global"]
    assert (view.flip, view.jitter_prob, view.grey_prob, view.blur_prob) == (0.0, 0.0, 0.0, 0.0)
    assert set(RECIPES["clip_crop"].kinds()) == {"global"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"masks": BlockMasks()}, "Use RandomMasks"),
        ({"num_masks": 0}, "num_masks: 0"),
        ({"views": views(global_count=2)}, "clip_crop"),
        ({"views": "crop"}, "clip_crop"),
        ({"views": views(global_size=8)}, "one patch"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        tiny(**settings)


def test_networks_that_do_not_fit_each_other_are_refused():
    clips, pictures = VideoViT(PLAIN, arguments=VIT), ViT(PLAIN, img_size=16, arguments=VIT)
    with pytest.raises(UserError, match="Use VideoViT and ViT"):
        DISCOVR(pictures, clips, views=views(), **SMALL)
    other = ViT(PLAIN, img_size=16, arguments={**VIT, "patch_size": 4})
    with pytest.raises(UserError, match="as large patches"):
        DISCOVR(clips, other, views=views(), **SMALL)
