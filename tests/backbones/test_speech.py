"""Networks over sound: lengths of the papers, padding that changes nothing, taps, export."""

import pytest
import torch
from torch.testing import assert_close

from ssd.backbones.speech import LAYERS, LogMelEncoder, SpeechEncoder
from ssd.backbones.transformer import ConvPositions
from ssd.batch import Padded
from ssd.errors import UserError
from ssd.frames import Frames
from ssd.parallel import blocks_in
from ssd.record import build, describe
from ssd.weights.export import export_backbone

SMALL = {"rate_hz": 8000, "embed_dim": 32, "depth": 3, "num_heads": 2}


def speech(**settings) -> SpeechEncoder:
    torch.manual_seed(0)
    return SpeechEncoder(**{**SMALL, "conv_dim": 16, **settings}).eval()


def log_mel(**settings) -> LogMelEncoder:
    torch.manual_seed(0)
    return LogMelEncoder(**{**SMALL, **settings}).eval()


NETWORKS = {
    "post": speech,
    "pre": lambda: speech(norm="pre", positions="conv"),
    "log-mel": log_mel,
    "log-mel over time": lambda: log_mel(patch=(2, 64)),
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(399, 0), (400, 1), (719, 1), (720, 2), (16_000, 49), (32_000, 99), (250_000, 781), (320_000, 999)],
)
def test_published_front_end_has_the_published_lengths(samples, frames):
    published = Frames(LAYERS[16_000])
    assert published.count(samples) == frames
    assert published.counts(torch.tensor([samples, 0])).tolist() == [frames, 0]
    assert (published.receptive_field, published.hop) == (400, 320)


def test_at_8_khz_a_token_is_20_ms_too():
    halved = Frames(LAYERS[8_000])
    assert (halved.receptive_field, halved.hop) == (240, 160)
    assert [halved.count(round(seconds * 8000)) for seconds in (0.14, 0.42, 2.28)] == [6, 20, 113]


@every_network
def test_the_answer_has_as_many_tokens_as_its_grid(make):
    backbone = make()
    tokens = backbone(torch.randn(2, 4000))
    assert tokens.grid == backbone.grid(4000)
    assert tokens.patches.shape == (2, torch.Size(tokens.grid).numel(), 32) and tokens.pooled().shape == (2, 32)


@every_network
def test_a_sound_answers_the_same_alone_and_padded(make):
    """Also where what is padding is not silence, and in every tap."""
    backbone = make()
    alone, longest = torch.randn(1, 2700), torch.randn(1, 4000)
    padded = torch.cat([alone, 5 * torch.randn(1, 1300)], dim=1)
    valid = torch.ones(2, 4000, dtype=torch.bool)
    valid[0, 2700:] = False
    taps = ("block1", "block2.mlp")
    expected = backbone(alone, taps=taps)
    found = backbone(Padded(torch.cat([padded, longest]), valid), taps=taps)
    count = expected.patches.shape[1]
    assert found.valid.sum(1).tolist() == [count, found.patches.shape[1]]
    tolerance = {"atol": 2e-5, "rtol": 1e-4}  # other kernels for other lengths
    assert_close(found.pooled()[:1], expected.pooled(), **tolerance)
    assert_close(found.patches[:1, :count], expected.patches, **tolerance)
    for tap in taps:
        assert_close(found.taps[tap][:1, :count], expected.taps[tap], **tolerance)


@every_network
def test_fused_attention_answers_as_plain_attention_does(make):
    backbone = make()
    valid = torch.ones(2, 4000, dtype=torch.bool)
    valid[0, 2700:] = False
    sounds = Padded(torch.randn(2, 4000), valid)
    fused = backbone(sounds).pooled()
    for module in backbone.attention:
        module.fused_attn = False
    backbone.use_fitting_attention = lambda tokens: None
    assert_close(backbone(sounds).pooled(), fused, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_tap_of_an_mlp_is_what_it_adds_before_the_residual_sum(norm):
    backbone = speech(norm=norm)
    tokens = backbone(torch.randn(2, 3000), taps=(1, 2, "block2.mlp"))
    block = backbone.blocks[1]
    before = tokens.taps["block1"]
    if norm == "post":
        middle = block.norm1(before + block.attn(before))
        assert_close(tokens.taps["block2.mlp"], block.mlp(middle))
        assert_close(tokens.taps["block2"], block.norm2(middle + tokens.taps["block2.mlp"]))
    else:
        middle = before + block.attn(block.norm1(before))
        assert_close(tokens.taps["block2"], middle + tokens.taps["block2.mlp"])


@every_network
def test_stopping_early_answers_what_the_tap_says(make):
    backbone = make()
    sounds = torch.randn(1, 3000)
    stopped, whole = backbone(sounds, until=2), backbone(sounds, taps=(2,))
    assert_close(backbone.tokens_at(whole.taps["block2"], whole.grid).patches, stopped.patches)


@pytest.mark.parametrize("patch", [(4, 16), (2, 64)])
def test_levels_stand_for_the_sounds_they_were_heard_in(patch):
    backbone = log_mel(patch=patch)
    valid = torch.ones(2, 4000, dtype=torch.bool)
    valid[0, 2700:] = False
    sounds = Padded(torch.randn(2, 4000), valid)
    expected, found = backbone(sounds), backbone(backbone.hear(sounds))
    assert found.grid == expected.grid and torch.equal(found.valid, expected.valid)
    assert torch.equal(found.patches, expected.patches)


def test_masked_frames_become_the_token_before_positions():
    backbone = speech()
    sounds, token = torch.randn(1, 3000), torch.zeros(1, 32)
    hidden = torch.zeros(1, 18, dtype=torch.bool)
    hidden[0, 4:9] = True
    frames, _ = backbone.embed(sounds)
    expected, _ = backbone.model.transformer(frames.masked_fill(hidden[..., None], 0), None)
    assert_close(backbone(sounds, masked=hidden, mask_token=token).patches, expected)
    indices = hidden.nonzero()[:, 1][None]
    assert_close(backbone(sounds, masked=indices, mask_token=token).patches, expected)


def test_positions_see_five_times_a_fifth_of_the_published_width():
    positions = ConvPositions(32, 5, 95, 16)
    assert [tuple(conv.kernel_size) for conv in positions.convs] == [(19,)] * 5
    frames = torch.zeros(1, 201, 32, requires_grad=True)
    positions(frames, None)[0, 100].sum().backward()
    reached = frames.grad[0].abs().sum(1).nonzero()[:, 0]
    assert reached.max() <= 100 + 45 and reached.min() >= 100 - 45


def test_a_block_that_is_left_out_changes_nothing_and_is_left_out_as_often_as_said():
    backbone = speech(layer_drop=0.25, dropout=0.0, attention_dropout=0.0).train()
    frames, _ = backbone.embed(torch.randn(1, 3000))
    torch.manual_seed(0)
    same = 0
    for _ in range(200):
        _, taps = backbone.model.transformer(frames, None, ("block1", "block2"))
        same += torch.equal(taps["block1"], taps["block2"])
    assert 30 <= same <= 70  # 50 are expected, 6 is a standard deviation


def test_loudness_does_not_move_the_spectrogram_encoder():
    backbone = log_mel()
    sounds = torch.randn(2, 3000)
    assert_close(backbone(10 * sounds).pooled(), backbone(sounds).pooled(), atol=1e-3, rtol=1e-3)


@every_network
def test_it_is_rebuilt_from_its_record_and_exported_with_lines_that_load_it(make, tmp_path):
    backbone = make()
    again = build(describe(backbone))
    again.load_state_dict(backbone.state_dict())
    sounds = torch.randn(1, 3000)
    assert torch.equal(again.eval()(sounds).patches, backbone(sounds).patches)
    if make in (NETWORKS["post"], NETWORKS["log-mel"]):
        assert export_backbone(backbone, tmp_path, "safetensors", lengths=(4000,)).difference < 1e-5
        started = build(describe(backbone))
        started.start_from(str(tmp_path))
        assert torch.equal(started.eval()(sounds).patches, backbone(sounds).patches)
        with pytest.raises(UserError, match="Export to safetensors"):
            export_backbone(backbone, tmp_path, "timm", lengths=(4000,))


def test_blocks_of_networks_over_sound_are_found_once_each():
    assert len(blocks_in(speech())) == len(blocks_in(speech().model.transformer)) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rate_hz": 22_050}, "Use 16000 or 8000"),
        ({"norm": "none"}, "'post' or 'pre'"),
        ({"positions": "learned"}, "'convs' or 'conv'"),
        ({"embed_dim": 40}, "a multiple of 16"),
        ({"num_heads": 5}, "a multiple of num_heads"),
        ({"layer_drop": 1.0}, "layer_drop"),
        ({"layers": [[2, 3]]}, "stride"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        speech(**settings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: torch.randn(1, 239), "shorter than one token.*sees 240 .30 ms."),
        (lambda: torch.randn(2, 1, 3000), "built for sounds"),
        (lambda: torch.zeros(2, 3000, dtype=torch.int16), "floating point"),
    ],
)
def test_inputs_that_cannot_be_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        speech()(given())
    with pytest.raises(UserError, match="cannot encode only the visible"):
        speech()(torch.randn(1, 3000), visible=torch.tensor([[0]]))
