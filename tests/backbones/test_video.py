import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from ssd.backbones.positions import flat_positions, sincos_positions
from ssd.backbones.video import VideoViT, tubes_of
from ssd.backbones.vit import ViT
from ssd.decoders import places
from ssd.errors import UserError
from ssd.masking.batch import masks_for
from ssd.masking.recipes import RandomMasks
from ssd.record import build, describe
from ssd.weights.export import export_backbone
from tests.backbones.test_vit import some_visible
from tests.weights.networks import disturbed

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
PLAIN, REGISTERS = "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"
NO_PREFIX = {"class_token": False}
FORMS = [
    {},
    {"attention": "divided"},
    {"positions": "flat"},
    {"positions": "learned", "img_size": 32, "frames": 4},
    {"prefix_per_slot": True},
    {"name": REGISTERS, "attention": "divided", "positions": "learned", "img_size": 32, "frames": 8},
    {"arguments": NO_PREFIX},
]


def video(**settings) -> VideoViT:
    torch.manual_seed(0)
    arguments = {**TINY, **settings.pop("arguments", {})}
    return disturbed(VideoViT(settings.pop("name", PLAIN), arguments=arguments, **settings))


def clips(batch: int = 2, frames: int = 6, height: int = 16, width: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed))


def test_tubes_are_a_convolution_whose_stride_is_its_size():
    backbone, x = video(), clips()
    expected = backbone.model.patch_embed.proj(x).flatten(2).mT
    assert_close(backbone.model.patch_embed(x, None), expected, atol=1e-5, rtol=1e-5)
    assert backbone.grid(6, 16, 24) == (3, 2, 3) and tubes_of(x, (2, 8, 8)).shape == (2, 18, 3 * 128)


def test_joint_attention_is_a_transformer_over_all_tubes_with_positions_of_three_axes():
    backbone, x = video(), clips()
    model = backbone.model
    patches = model.patch_embed.proj(x).flatten(2).mT + sincos_positions((3, 2, 3), 24)
    sequence = torch.cat([model.cls_token.expand(2, -1, -1), patches], dim=1)
    for block in model.blocks:
        sequence = block(sequence)
    tokens = backbone(x)
    assert tokens.grid == (3, 2, 3)
    assert_close(torch.cat([tokens.cls[:, None], tokens.patches], 1), model.norm(sequence))


def test_divided_attention_is_time_at_each_place_then_space_at_each_time():
    """Written out with loops over places and times."""
    backbone, x = video(attention="divided"), clips(1)
    model, slots, places = backbone.model, 3, 6
    _, sequence, _ = backbone.embed(x, None, None, None)
    cls, patches = sequence[:, :1], sequence[:, 1:].clone()
    for block in model.blocks:
        through = torch.zeros_like(patches)
        for place in range(places):
            rows = [time * places + place for time in range(slots)]
            through[:, rows] = block.time_attn(block.time_norm(patches[:, rows]))
        patches = patches + through
        of_cls, of_patches = [], []
        for time in range(slots):
            seen = block.attn(block.norm1(torch.cat([cls, patches[:, time * places : (time + 1) * places]], 1)))
            of_cls.append(seen[:, :1])
            of_patches.append(seen[:, 1:])
        cls, patches = cls + sum(of_cls) / slots, patches + torch.cat(of_patches, 1)
        cls, patches = (part + block.mlp(block.norm2(part)) for part in (cls, patches))
    tokens = backbone(x)
    assert_close(tokens.cls, model.norm(cls)[:, 0], atol=1e-5, rtol=1e-5)
    assert_close(tokens.patches, model.norm(patches), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_all_places_listed_as_visible_are_the_whole_clip(form):
    backbone, x = video(**form), clips()
    whole, listed = backbone(x), backbone(x, visible=torch.arange(18).expand(2, -1))
    assert_close(listed.patches, whole.patches, atol=1e-5, rtol=1e-4)
    assert_close(listed.pooled(), whole.pooled(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_pixels_that_are_not_visible_change_nothing(form):
    backbone, x, visible = video(**form), clips(), some_visible(2, 18, 7)
    shown = torch.zeros(2, 18, dtype=torch.bool).scatter(1, visible, True).unflatten(1, (3, 2, 3))
    for axis, side in enumerate((2, 8, 8), 1):
        shown = shown.repeat_interleave(side, axis)
    other = torch.where(shown[:, None], x, torch.full_like(x, float("nan")))
    assert_close(backbone(other, visible=visible).patches, backbone(x, visible=visible).patches, atol=0, rtol=0)
    among_all = places(backbone(x).patches, visible)
    assert not torch.allclose(among_all, backbone(x, visible=visible).patches)


@pytest.mark.parametrize("form", FORMS)
def test_pixels_that_are_masked_change_nothing_and_the_token_is_seen(form):
    backbone, x, hidden = video(**form), clips(), some_visible(2, 18, 7)
    boolean = torch.zeros(2, 18, dtype=torch.bool).scatter(1, hidden, True)
    token = torch.randn(24)
    tokens = backbone(x, masked=boolean, mask_token=token)
    gone = boolean.unflatten(1, (3, 2, 3))
    for axis, side in enumerate((2, 8, 8), 1):
        gone = gone.repeat_interleave(side, axis)
    again = backbone(x.masked_fill(gone[:, None], 7.0), masked=hidden, mask_token=token)
    assert_close(again.patches, tokens.patches)
    assert not torch.allclose(backbone(x, masked=boolean, mask_token=token + 1).patches, tokens.patches)


def test_several_masks_of_each_clip_are_one_table():
    backbone, x = video(), clips()
    tables = torch.stack([some_visible(2, 18, 5, seed) for seed in (3, 4, 5)])
    together = backbone(x, visible=tables.flatten(0, 1)).patches.unflatten(0, (3, 2))
    for number, table in enumerate(tables):
        assert_close(together[number], backbone(x, visible=table).patches, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["joint", "divided"])
def test_taps_and_until_are_the_blocks_of_the_whole(attention):
    backbone, x = video(attention=attention), clips()
    tokens = backbone(x, taps=(0, 1, 2, "block2.mlp"))
    early = backbone(x, until=2)
    assert_close(backbone.tokens_at(tokens.taps["block2"], tokens.grid).patches, early.patches)
    assert tokens.taps["block0"].shape == tokens.taps["block2.mlp"].shape == (2, 19, 24)


def test_tubes_of_random_masks_keep_the_same_places_at_all_times():
    grid = VideoViT(PLAIN, arguments={**TINY, "patch_size": 16}).grid
    small, large = grid(64, 112, 112), grid(64, 224, 224)
    for lengths, tokens, shown in ((small, 1568, 160), (large, 6272, 640)):
        masks = masks_for(RandomMasks(0.9, tube=True), 2, 2, lengths, 0)
        assert masks.boolean.shape[2] == tokens and masks.visible.shape[2] == shown
        by_time = masks.boolean.unflatten(2, lengths).flatten(3)
        assert (by_time == by_time[:, :, :1]).all()


# ---------------------------------------------------------------------- from pictures


def still(frames: int = 6) -> tuple[Tensor, Tensor]:
    picture = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(5))
    return picture, picture[:, :, None].expand(-1, -1, frames, -1, -1)


def picture_network(tmp_path, name: str = PLAIN, **arguments) -> tuple[ViT, str]:
    torch.manual_seed(3)
    backbone = disturbed(ViT(name, img_size=(16, 24), arguments={**TINY, **arguments}))
    save_file(backbone.model.state_dict(), tmp_path / "picture.safetensors")
    return backbone, str(tmp_path / "picture.safetensors")


@pytest.mark.parametrize("inflation", ["central", "mean"])
@pytest.mark.parametrize(
    ("name", "arguments", "settings"),
    [
        (PLAIN, {}, {"attention": "divided"}),
        (PLAIN, {}, {"prefix_per_slot": True}),
        (PLAIN, {"class_token": False}, {}),
        (REGISTERS, {}, {"attention": "divided"}),
    ],
)
def test_a_clip_that_stands_still_gets_the_pictures_tokens(tmp_path, inflation, name, arguments, settings):
    reference, weights = picture_network(tmp_path, name, **arguments)
    backbone = VideoViT(
        name, img_size=(16, 24), frames=6, positions="learned", weights=weights, inflation=inflation,
        arguments={**TINY, **arguments}, **settings,
    ).eval()  # fmt: skip
    picture, clip = still()
    tokens, expected = backbone(clip), reference(picture)
    for time in tokens.patches.unflatten(1, (3, 6)).unbind(1):
        assert_close(time, expected.patches, atol=1e-5, rtol=1e-5)
    assert_close(tokens.pooled(), expected.pooled(), atol=1e-5, rtol=1e-5)


def test_a_prefix_that_counts_once_answers_a_picture_of_one_slot_alone(tmp_path):
    reference, weights = picture_network(tmp_path)
    settings = {"img_size": (16, 24), "positions": "learned", "weights": weights, "arguments": TINY}
    backbone = VideoViT(PLAIN, **settings).eval()
    assert_close(backbone(still(2)[1]).patches, reference(still()[0]).patches, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(backbone(still(6)[1]).cls, reference(still()[0]).cls, atol=1e-3)


def test_central_weights_see_the_middle_frame_and_mean_weights_all(tmp_path):
    _, weights = picture_network(tmp_path)
    x = clips()
    changed = x.clone()
    changed[:, :, ::2] = 0  # the first frame of each tube
    for inflation, same in (("central", True), ("mean", False)):
        settings = {"positions": "learned", "img_size": (16, 24), "weights": weights, "inflation": inflation}
        backbone = VideoViT(PLAIN, arguments=TINY, **settings).eval()
        assert torch.equal(backbone(x).patches, backbone(changed).patches) == same


def test_weights_of_clips_come_back_with_time_resized(tmp_path):
    first = video(positions="learned", img_size=(16, 24), frames=6)
    report = export_backbone(first, tmp_path / "own", "safetensors", lengths=(6, 16, 24), mean=[0.5] * 3, std=[0.5] * 3)
    assert report.difference <= 1e-5 and "from ssd.record import build" in report.code
    settings = {"positions": "learned", "arguments": TINY, "weights": report.folder}
    again = VideoViT(PLAIN, img_size=(16, 24), frames=6, **settings).eval()
    assert torch.equal(again(clips()).patches, first(clips()).patches)
    longer = VideoViT(PLAIN, img_size=(16, 24), frames=12, **settings)
    assert_close(longer.model.time_embed, F.interpolate(first.model.time_embed.mT, 6, mode="linear").mT)


# ---------------------------------------------------------------------- odd inputs


def test_frames_that_tubes_do_not_divide_are_filled_by_the_last_one():
    backbone, x = video(), clips(frames=5, height=12)
    with pytest.warns(UserWarning, match=r"5 x 12 x 24, by their last frame"):
        tokens = backbone(x)
    full = F.pad(torch.cat([x, x[:, :, -1:]], 2), (0, 0, 0, 4))
    assert_close(tokens.patches, backbone(full).patches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone(x)


def test_learned_positions_are_resized_along_each_axis():
    backbone = video(positions="learned", img_size=(16, 24), frames=6)
    patches, _ = backbone.model.learned_positions((3, 2, 3))
    own = backbone.model.time_embed[0, :, None] + backbone.model.pos_embed[:, 1:]
    assert_close(patches, own.flatten(0, 1))
    longer, _ = backbone.model.learned_positions((6, 2, 3))
    by_time = longer.unflatten(0, (6, 6))
    apart = by_time - by_time[:, :1]  # places differ alike at all times
    assert_close(apart, apart[:1].expand(6, -1, -1), atol=1e-6, rtol=1e-5)


def test_flat_positions_are_sines_and_cosines_in_turn():
    table = flat_positions((2, 3), 4)
    expected = [[torch.tensor(i * w).sin(), torch.tensor(i * w).cos()] for i in range(6) for w in (1.0, 0.01)]
    assert_close(table.flatten(), torch.tensor(expected).flatten())


def test_half_precision_takes_the_bias_of_prefix_tokens():
    backbone, x = video(prefix_per_slot=True), clips()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(backbone(x).cls.float(), backbone.float()(x).cls.float(), atol=0.1, rtol=0.1)


def test_activation_checkpointing_and_drop_path_reach_divided_blocks():
    backbone = video(attention="divided", drop_path_rate=0.5, drop_path_rule="uniform").train()
    assert not torch.equal(backbone(clips()).patches, backbone(clips()).patches)
    first, second = (video(attention="divided", activation_checkpointing=kept).train() for kept in (False, True))
    for backbone in (first, second):
        backbone(clips()).pooled().square().sum().backward()
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


def test_a_record_rebuilds_it():
    backbone = video(attention="divided", positions="learned", img_size=32, frames=4)
    again = build(describe(backbone))
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(again.eval()(clips()).patches, backbone(clips()).patches)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attention": "sparse"}, "Choose one of joint, divided"),
        ({"positions": "none"}, "Choose one of sincos, flat, learned"),
        ({"tubelet": 0}, "tubelet: 0"),
        ({"name": "vit_small_patch16_dinov3"}, "rotary positions"),
        ({"attention": "divided", "prefix_per_slot": True}, "by itself"),
        ({"attention": "divided", "drop_path_rate": 0.1, "drop_path_rule": "subset"}, "Use 'uniform'"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        video(**settings)


def test_pictures_and_their_weights_are_told_from_clips(tmp_path):
    _, weights = picture_network(tmp_path)
    with pytest.raises(UserError, match="Use positions: learned"):
        VideoViT(PLAIN, img_size=(16, 24), weights=weights, arguments=TINY)
    with pytest.raises(UserError, match=r"built for clips of 3 channels"):
        video()(torch.zeros(2, 3, 16, 16))
    with pytest.raises(UserError, match="views of clips"):
        video().grid(16, 16)
