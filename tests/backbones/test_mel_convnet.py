"""The convolutional network over spectrograms: published shapes, padding that changes nothing, taps, export."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ssd.backbones.convnet import ConvNet
from ssd.backbones.mel_convnet import MelConvNet, maximum_and_mean
from ssd.batch import Padded
from ssd.errors import UserError
from ssd.record import build, describe
from ssd.spectrogram import Levels, mel_filters
from ssd.weights.export import export_backbone

SMALL = {"rate_hz": 8000, "mels": 16, "channels": 4, "embed_dim": 12}


def small(**settings) -> MelConvNet:
    """With statistics that are not those it was drawn with."""
    torch.manual_seed(0)
    backbone = MelConvNet(**SMALL | settings)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1), nn.init.uniform_(module.running_var, 0.5, 2)
    return backbone.eval()


def test_published_lengths_and_widths():
    """15,200 samples every 160, centred: 96 windows, 12 tokens; 64 channels by 32, 16 and 8 bands; 2,048 in the end."""
    backbone = MelConvNet().eval()
    levels = backbone.hear(torch.randn(2, 15_200))
    assert levels.values.shape == (2, 96, 64) and levels.counts is None
    tokens = backbone(levels, taps=(1, 2, 3))
    assert tokens.grid == backbone.grid(15_200) == (12,)
    assert [backbone.block_dim(number) for number in (1, 2, 3)] == [2048, 1024, 512]
    assert [tokens.taps[f"block{number}"].shape[2] for number in (1, 2, 3)] == [2048, 1024, 512]
    assert tokens.pooled().shape == (2, 2048) and backbone.embed_dim == 2048
    assert (backbone.frames.hop, backbone.frames.shortest) == (1280, 1120)


def test_levels_are_the_natural_logarithm_of_power_around_each_tenth_millisecond():
    backbone = small()
    sounds = torch.randn(1, 4000)
    around = torch.nn.functional.pad(sounds[0], (256, 256))[3 * 80 : 3 * 80 + 512]
    power = torch.fft.rfft(around * torch.hann_window(512)).abs().square()
    expected = (mel_filters(512, 8000, 16, 60.0, 3900.0) @ power + 1e-7).log()
    assert_close(backbone.hear(sounds).values[0, 3], expected, atol=1e-4, rtol=1e-4)


def test_bands_lie_between_the_given_frequencies():
    filters = mel_filters(1024, 16_000, 64, 60.0, 7800.0)
    hz = torch.linspace(0, 8000, 513)
    reached = hz[(filters > 0).any(0)]
    assert reached.min() >= 60 and reached.max() <= 7800
    assert torch.equal(mel_filters(400, 16_000), mel_filters(400, 16_000, 64, 0.0, 8000.0))


def test_features_of_a_block_are_bands_by_channels_averaged_over_time():
    backbone = small()
    sounds = torch.randn(2, 80 * 63)  # 64 windows, which three poolings divide
    maps, tokens = backbone.hear(sounds).values[:, None], backbone(sounds, taps=(1, 2, 3))
    for number, block in enumerate(backbone.blocks, 1):
        maps = block(maps)
        expected = maps.permute(0, 2, 3, 1).flatten(2).mean(1)
        assert_close(tokens.taps[f"block{number}"].mean(1), expected, atol=1e-5, rtol=1e-4)
    last = backbone.model.mlp(maps.permute(0, 2, 3, 1).flatten(2))
    assert_close(tokens.pooled(), last.amax(1) + last.mean(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1100, 2700, 2719, 2720, 3360])
def test_a_sound_answers_the_same_alone_and_padded(length):
    """Also where what is padding is not silence, and in every tap."""
    backbone = small()
    alone, longest = torch.randn(1, length), torch.randn(1, 4000)
    padded = torch.cat([alone, 5 * torch.randn(1, 4000 - length)], dim=1)
    valid = torch.ones(2, 4000, dtype=torch.bool)
    valid[0, length:] = False
    expected, found = (
        backbone(sounds, taps=(1, 2, 3)) for sounds in (alone, Padded(torch.cat([padded, longest]), valid))
    )
    count = expected.patches.shape[1]
    assert found.valid.sum(1).tolist() == [count, found.patches.shape[1]]
    tolerance = {"atol": 2e-5, "rtol": 1e-4}  # other kernels for other lengths
    assert_close(found.pooled()[:1], expected.pooled(), **tolerance)
    for tap, tokens in expected.taps.items():
        assert_close(found.taps[tap][:1, :count], tokens, **tolerance)


def test_pooling_leaves_padding_out():
    tokens = torch.tensor([[[-3.0], [-1.0], [9.0]]])
    valid = torch.tensor([[True, True, False]])
    assert maximum_and_mean(tokens, valid).item() == -1 - 2
    assert maximum_and_mean(tokens, None).item() == pytest.approx(9 + 5 / 3)


def test_levels_stand_for_the_sounds_they_were_heard_in():
    backbone = small()
    valid = torch.ones(2, 4000, dtype=torch.bool)
    valid[0, 2000:] = False
    sounds = Padded(torch.randn(2, 4000), valid)
    assert torch.equal(backbone(backbone.hear(sounds)).pooled(), backbone(sounds).pooled())


def test_in_evaluation_no_sound_depends_on_its_batch_and_nothing_is_written():
    backbone = small()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    sounds = torch.randn(3, 4000)
    assert_close(backbone(sounds).pooled()[:1], backbone(sounds[:1]).pooled())
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_widths_of_tapped_stages_of_a_picture_network():
    backbone = ConvNet("resnet18", arguments={"layers": [1, 1, 1, 1], "channels": [8, 12, 16, 20], "stem_width": 8})
    taps = backbone(torch.randn(1, 3, 64, 64), taps=(1, 2, 3, 4)).taps
    assert [taps[f"block{number}"].shape[1] for number in (1, 2, 3, 4)] == [backbone.block_dim(n) for n in (1, 2, 3, 4)]


def test_what_is_exported_is_rebuilt_alike(tmp_path):
    backbone = small()
    report = export_backbone(backbone, tmp_path, "safetensors", lengths=(4000,))
    assert report.difference < 1e-5
    again = build(describe(small(weights=str(tmp_path))))
    assert again.mels == 16 and "weights" not in describe(again)["init_args"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mels": 20}, "multiple of 8"),
        ({"channels": 0}, "positive widths"),
        ({"highest_hz": 5000.0}, "half the rate, 4000 Hz"),
        ({"dropout": 1.0}, "below 1"),
        ({"rate_hz": 100}, "1000 or more"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        MelConvNet(**SMALL | settings)


def test_too_short_a_sound_and_what_the_network_cannot_do_are_named():
    backbone = small()
    with pytest.raises(UserError, match="which sees 560 "):
        backbone(torch.randn(1, 559))
    assert backbone(torch.randn(1, 560)).patches.shape[1] == 1
    with pytest.raises(UserError, match="cannot stop after a block"):
        backbone(torch.randn(1, 4000), until=1)
    with pytest.raises(UserError, match="one convolution each"):
        backbone(torch.randn(1, 4000), taps=("block1.mlp",))
    assert Levels(torch.zeros(1, 3, 2)).there.all()
