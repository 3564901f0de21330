import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_modules.dmjd import DMJD, predictions_of_a_hidden_patch
from lightning_modules.mae import MAE
from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.errors import UserError
from ssd.masked_branch import Decoded
from ssd.masking.recipes import BlockMasks, DisjointMasks, RandomMasks
from ssd.normalisation import NAMED
from ssd.schedules import Cosine
from ssd.views.photometry import normalise
from ssd.views.recipes import CropViews, DINOViews
from tests.contract import MethodContract, run_steps, start
from tests.lightning_modules.test_mae import DECODER, VIT
from tests.test_hog import restated

DATA = torch.tensor([[0.2, 0.5, 0.7], [0.1, 0.2, 0.3]])


def vit(**settings) -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=32, fixed_positions=True, arguments={**VIT, **settings})


def tiny(**settings) -> DMJD:
    torch.manual_seed(0)
    defaults = {"views": CropViews(size=32), "masks": DisjointMasks(0.6), "cell": 4, "predictor_dim": 16}
    return DMJD(vit(), **{**defaults, "lr": 1e-4, "lr_rule": "none", **DECODER, **settings})


def levels(samples: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, samples, 3, 32, 32), dtype=torch.uint8, generator=generator)


def batch_of(pictures: torch.Tensor) -> Batch:
    views = {"global": normalise(pictures, DATA[0].tolist(), DATA[1].tolist())}
    samples = pictures.shape[1]
    return Batch(views=views, index=torch.arange(samples), total=samples, normalisation=DATA)


def masked_batch(module: DMJD, samples: int, seed: int, pictures: torch.Tensor | None = None) -> Batch:
    batch = batch_of(levels(samples, seed) if pictures is None else pictures)
    batch.masks["global"] = module.mask_plans()["global"].draw(samples, 0, seed)
    return batch


def terms(module: DMJD, batch: Batch) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return module.losses(batch, module.targets(batch))


class TestContract(MethodContract):
    def make(self, **engine):
        return tiny(**engine)

    def batch(self, samples, seed):
        return batch_of(levels(samples, seed))


class TestContractWithATeacher(TestContract):
    def make(self, **engine):
        torch.manual_seed(1)
        return tiny(target="teacher", teacher=vit(embed_dim=32, depth=1), teacher_normalize="clip", **engine)


def test_the_loss_is_that_of_the_paper_written_out():
    """Picture by picture, mask by mask and patch by patch; histograms from the levels, by loops over pixels."""
    module = tiny(masks=DisjointMasks(0.6, 0.8))
    batch = masked_batch(module, 2, 1)
    found = terms(module, batch)
    masks, predictor = batch.masks["global"].boolean, module.student.predictor
    assert masks.shape == (2, 2, 16)
    hidden_error, seen_error = [], []
    with torch.no_grad():
        for sample, picture in enumerate(levels(2, 1)[0].float()):
            cells = torch.stack([restated(channel, 4) for channel in picture])  # (C, 8, 8, 9)
            for mask in range(2):
                hidden = masks[mask, sample]
                seen = [place for place in range(16) if not hidden[place]]
                alone = batch.views["global"][:, sample : sample + 1]
                decoded, _ = module.student(alone, torch.tensor([[seen]]))
                for place in range(16):
                    row, column = divmod(place, 4)
                    values = []
                    for y in range(2):
                        for x in range(2):
                            for channel in range(3):
                                cell = cells[channel, 2 * row + y, 2 * column + x]
                                values.append((cell - cell.mean()) / (cell.var(correction=0) + 1e-5).sqrt())
                    target = torch.cat(values).float()
                    if hidden[place]:
                        hidden_error.append(((decoded.patches[0, 0, place] - target) ** 2).mean())
                    else:
                        token = decoded.tokens.patches[0, seen.index(place)]
                        deep = predictor[0]
                        for number in (0, 3):
                            token = F.gelu(F.layer_norm(deep[number](token), (16,), eps=1e-6))
                        token = F.layer_norm(deep[6](token), (16,), eps=1e-6)
                        error = (predictor[2](token) - target).abs()
                        seen_error.append(torch.where(error < 2, error**2 / 4, error - 1).mean())
    assert_close(found["masked"], torch.stack(hidden_error).mean(), atol=1e-4, rtol=1e-4)
    assert_close(found["visible"], torch.stack(seen_error).mean(), atol=1e-4, rtol=1e-4)


class Coded(torch.nn.Module):
    """Token i of each picture carries what belongs to place i, and heads say what they are given."""

    def __init__(self, values: torch.Tensor):
        super().__init__()
        self.values = values  # (1, B, N, D)

    def forward(self, pictures, visible):
        whole = self.values.expand(len(visible), -1, -1, -1)
        index = visible[..., None].expand(-1, -1, -1, whole.shape[-1])
        return Decoded(whole, None, None), whole.gather(2, index)


def test_with_a_coded_input_both_losses_are_zero_and_only_where_places_agree():
    """Predictions in shuffled order against targets in the order of the picture would pay in all but a few slots."""
    module = tiny()
    batch = masked_batch(module, 3, 0)
    targets = module.targets(batch)
    module.student = Coded(torch.arange(16.0)[None, None, :, None].expand(1, 3, 16, 108).clone())
    coded = type(targets)(patches=module.student.values)
    found = module.losses(batch, coded)
    assert found["masked"] == 0 and found["visible"] == 0
    for turned in (coded.patches.flip(2), coded.patches.roll(1, 2)):
        found = module.losses(batch, type(targets)(patches=turned))
        assert found["masked"] > 1 and found["visible"] > 0.1


def test_places_of_visible_patches_are_sorted_and_the_two_masks_leave_none_in_common():
    module = tiny()
    masks = masked_batch(module, 8, 0).masks["global"]
    assert masks.visible.shape == (2, 8, 6)
    assert (masks.visible.diff(dim=-1) > 0).all()
    for first, second in zip(masks.visible[0].tolist(), masks.visible[1].tolist(), strict=True):
        assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("masks", "visible", "union", "both"),
    [
        (DisjointMasks(0.6, cell=2), 76, 196, 44),
        (DisjointMasks(0.75, cell=2), 48, 196, 100),
        (DisjointMasks(0.4), 117, 157, 1),
    ],
)
def test_published_counts_reach_the_method(masks, visible, union, both):
    """On 14 x 14 patches, as the plan that the data follows draws them."""
    module = DMJD(
        ViT("vit_tiny_patch16_224", fixed_positions=True, arguments={**VIT, "patch_size": 16}),
        masks=masks,
        **DECODER,
    )
    drawn = module.mask_plans()["global"].draw(4, 0, 0)
    assert drawn.visible.shape == (2, 4, visible)
    assert ((drawn.boolean[0] | drawn.boolean[1]).sum(-1) == union).all()
    assert ((drawn.boolean[0] & drawn.boolean[1]).sum(-1) == both).all()
    assert module.student.decoder.head.out_features == 108


def test_hidden_pixels_reach_the_target_and_nothing_that_is_seen():
    module = tiny()
    pictures = levels(2, 0)
    batch = masked_batch(module, 2, 0, pictures)
    visible = batch.masks["global"].visible
    with torch.no_grad():
        decoded, seen = module.student(batch.views["global"], visible)
    place = int(batch.masks["global"].masked[0, 0, 0])
    row, column = divmod(place, 4)
    pictures[0, 0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = levels(1, 9)[0, 0, :, :8, :8]
    changed = masked_batch(module, 2, 0, pictures)
    with torch.no_grad():
        decoded_then, seen_then = module.student(changed.views["global"], visible)
    assert torch.equal(seen[0], seen_then[0]) and torch.equal(decoded.patches[0], decoded_then.patches[0])
    moved = (module.targets(batch).patches != module.targets(changed).patches).any(-1)[0]
    assert moved[0, place] and not moved[1].any()
    # another mask leaves this place visible or hidden; what it sees of it differs only where it sees it
    shown = place in visible[1, 0].tolist()
    assert torch.equal(seen[1, 0], seen_then[1, 0]) != shown


def test_pictures_of_one_colour_and_ramps_keep_their_targets_through_the_normalisation():
    module = tiny(cell=8)
    flat = torch.tensor([3, 128, 250], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
    ramp = torch.arange(32, dtype=torch.uint8).expand(3, 32, 32)
    found = module.targets(batch_of(torch.stack([flat, ramp])[None])).patches[0]  # (2, 16, 27)
    assert not found[0].any()
    expected = torch.tensor([2.8284] + [-0.3536] * 8).repeat(3)
    assert_close(found[1], expected.expand(16, 27), atol=1e-3, rtol=0)


def test_the_rate_follows_pictures_and_how_often_their_patches_are_predicted():
    """6e-4 for 256: with 512 pictures and two masks of .6 it is 2.0e-3."""
    module = tiny(lr=6e-4, lr_rule="linear", steps=1)
    optimizers = start(module)
    batch = masked_batch(module, 4, 0)
    batch.total = 512
    module.take_step(batch, optimizers)
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(2.0e-3)
    assert tiny(lr=6e-4).optimized()[0].lr == 6e-4, "a rate that follows nothing stays as it is written"
    assert tiny(lr=Cosine(6e-4, 1e-5), lr_rule="linear").optimized()[0].lr == Cosine(1e-3, 1e-5)
    assert tiny(lr=6e-4, lr_rule="sqrt").optimized()[0].lr == pytest.approx(6e-4 / 0.6**0.5)


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        (DisjointMasks(0.6), 1 / 0.6),
        (DisjointMasks(0.6, 0.8), 0.8 / 0.6),
        (DisjointMasks(0.4), 2.0),  # two views cannot hide everything
        (RandomMasks(0.75), 1.0),
    ],
)
def test_how_often_a_hidden_patch_is_predicted(masks, expected):
    assert predictions_of_a_hidden_patch(masks) == pytest.approx(expected)


def test_the_weight_of_visible_patches_is_a_setting_that_counts():
    first, second = tiny(visible_weight=1.0), tiny(visible_weight=0.0)
    batch = masked_batch(first, 4, 0)
    with_it = first.take_step(batch, start(first))
    without = second.take_step(batch, start(second))
    assert with_it.terms == pytest.approx(without.terms)
    assert with_it.total == pytest.approx(with_it.terms["masked"] + with_it.terms["visible"])
    assert without.total == pytest.approx(without.terms["masked"])


def test_with_pixels_the_masked_loss_is_the_mean_of_maes_on_each_mask():
    module = tiny(target="pixels")
    batch = masked_batch(module, 3, 0)
    mae = MAE(vit(), views=CropViews(size=32), **DECODER)
    mae.student.load_state_dict(
        {name: value for name, value in module.student.state_dict().items() if not name.startswith("predictor")}
    )
    each = []
    masks = batch.masks["global"]
    for mask in range(2):
        batch.masks["global"] = type(masks)(
            masks.boolean[mask : mask + 1], masks.masked[mask : mask + 1], masks.visible[mask : mask + 1]
        )
        each.append(terms(mae, batch)["pixels"])
    batch.masks["global"] = masks
    assert_close(terms(module, batch)["masked"], torch.stack(each).mean(), atol=1e-5, rtol=1e-5)


def test_a_teacher_looks_once_at_each_whole_picture_in_its_own_way():
    torch.manual_seed(1)
    teacher = vit(embed_dim=32, depth=2)
    module = tiny(target="teacher", teacher=teacher, teacher_normalize="imagenet")
    batch = masked_batch(module, 3, 0)
    calls = []
    teacher.register_forward_hook(lambda network, arguments, answer: calls.append(arguments[0]))
    found = module.targets(batch).patches
    assert len(calls) == 1 and found.shape == (1, 3, 16, 32)
    assert_close(calls[0], normalise(levels(3, 0)[0], *NAMED["imagenet"]), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        raw = teacher(calls[0], taps=(2,)).taps["block2"][:, 1:]
    assert_close(found[0], F.layer_norm(raw, (32,)), atol=1e-5, rtol=1e-5)
    assert run_steps(module, [batch])[0]["masked"] > 0


def test_pictures_whose_normalisation_is_not_known_have_no_histograms():
    module = tiny()
    batch = masked_batch(module, 2, 0)
    batch.normalisation = None
    with pytest.raises(UserError, match="does not say"):
        module.targets(batch)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"masks": BlockMasks()}, "Use RandomMasks"),
        ({"target": "colours"}, "Choose one of hog, pixels, teacher"),
        ({"target": "teacher"}, "needs one"),
        ({"target": "hog", "teacher": "own"}, "A teacher is for"),
        ({"cell": 3}, "does not divide patches of 8"),
        ({"cell": 0}, "does not divide"),
        ({"views": DINOViews(global_size=32, local_count=0)}, "one 'global' view"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    if settings.get("teacher") == "own":
        settings = settings | {"teacher": vit()}
    with pytest.raises(UserError, match=said):
        tiny(**settings)
