import pytest
import torch
from timm.layers import build_sincos2d_pos_embed
from torch.testing import assert_close

from ssd.backbones.positions import sincos_positions
from ssd.decoders import ConvDecoder, MaskedDecoder, Projector, places, spread
from ssd.errors import UserError

GRID = (3, 4)


def some_visible(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    order = torch.rand(batch, 12, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :count].sort(1).values


def test_positions_are_timms_for_pictures_and_split_evenly_over_more_axes():
    theirs = build_sincos2d_pos_embed([4, 4], dim=32, reverse_coord=False, interleave_sin_cos=False)
    waves = {tuple(wave) for wave in (sincos_positions((4, 4), 32).T * 1e4).round().int().tolist()}
    assert waves == {tuple(wave) for wave in (theirs.T * 1e4).round().int().tolist()}, "in another order"
    clip = sincos_positions((2, 3, 4), 20)  # 3 frequencies an axis, 2 dimensions left over
    assert clip.shape == (24, 20) and not clip[:, 18:].any()
    assert_close(clip[0, :18], torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0] * 3))
    columns, rows, times = clip[:, :6], clip[:, 6:12], clip[:, 12:18]
    assert torch.equal(columns[1], columns[5]) and not torch.equal(columns[1], columns[2])
    assert torch.equal(rows[0], rows[3]) and not torch.equal(rows[0], rows[4])
    assert torch.equal(times[0], times[11]) and not torch.equal(times[0], times[12])
    with pytest.raises(UserError, match="at least 4"):
        sincos_positions((2, 2), 3)


def test_tokens_arrive_at_their_places_and_come_back():
    visible = some_visible(2, 5)
    coded = visible[..., None].float() + torch.tensor([0.0, 100.0])
    whole = spread(coded, visible, 12, torch.full((1, 1, 2), -1.0))
    for row in range(2):
        for place in range(12):
            expected = [place, 100 + place] if place in visible[row] else [-1, -1]
            assert whole[row, place].tolist() == expected
    assert torch.equal(places(whole, visible), coded)


@pytest.mark.parametrize("has_cls", [True, False])
def test_a_decoder_answers_for_every_place_and_each_visible_token_reaches_all(has_cls):
    torch.manual_seed(0)
    decoder = MaskedDecoder(10, 7, dim=16, depth=2, num_heads=2, has_cls=has_cls)
    patches, visible = torch.randn(2, 5, 10), some_visible(2, 5)
    cls = torch.randn(2, 10) if has_cls else None
    answers = decoder(patches, visible, GRID, cls)
    assert answers.shape == (2, 12 + has_cls, 7)
    changed = patches.clone()
    changed[0, 2] += 1
    moved = (decoder(changed, visible, GRID, cls) != answers).any(-1)
    assert moved[0].all() and not moved[1].any()


def test_the_order_of_visible_tokens_does_not_matter_when_their_places_go_along():
    torch.manual_seed(0)
    decoder = MaskedDecoder(10, 7, dim=16, depth=1, num_heads=2, has_cls=False)
    patches, visible = torch.randn(2, 5, 10), some_visible(2, 5)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert_close(decoder(patches[:, order], visible[:, order], GRID), decoder(patches, visible, GRID))


def test_a_convolutional_decoder_sees_its_neighbourhood_and_noise_where_nothing_is_visible():
    torch.manual_seed(0)
    decoder = ConvDecoder(8, 3, dim=8, depth=1, kernel=3, groups=2, noise=0.0)
    patches = torch.zeros(1, 1, 8)
    visible = torch.tensor([[0]])
    still = decoder(patches, visible, GRID)
    moved = (decoder(patches + torch.randn(8), visible, GRID) != still).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [0, 1, 4, 5], "a kernel of 3 about the upper left corner of 3 x 4 places"
    noisy = ConvDecoder(8, 3, dim=8, depth=1, kernel=3, groups=2, noise=0.01)
    assert (noisy(patches, visible, GRID) != noisy(patches, visible, GRID)).any()


def test_a_convolutional_decoder_adds_what_it_found_where_widths_agree():
    torch.manual_seed(0)
    same, wider = (
        ConvDecoder(8, 8, dim=8, depth=1, groups=2, noise=0.0),
        ConvDecoder(8, 8, dim=12, depth=1, groups=2, noise=0.0),
    )
    for decoder in (same, wider):
        torch.nn.init.zeros_(decoder.layers[0].weight)
        torch.nn.init.zeros_(decoder.layers[0].bias)
    torch.nn.init.eye_(same.head.weight)
    torch.nn.init.zeros_(same.head.bias)
    patches, visible = torch.randn(1, 5, 8), some_visible(1, 5)
    assert_close(places(same(patches, visible, GRID), visible), patches)
    assert_close(wider(patches, visible, GRID), wider.head.bias.expand(1, 12, 8))


def test_a_projector_is_linear_layers_with_gelu_between_them():
    torch.manual_seed(0)
    projector = Projector(4, 3, hidden=(5,), norm=True)
    x = torch.randn(2, 6, 4)
    first, norm, last = projector[0], projector[1], projector[3]
    assert_close(projector(x), last(torch.nn.functional.gelu(norm(first(x)))))
    assert len(Projector(4, 3)) == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MaskedDecoder(8, 4, dim=16, num_heads=3), "heads that divide the width"),
        (lambda: MaskedDecoder(8, 4, depth=0), "Use 1 block"),
        (lambda: ConvDecoder(8, 4, kernel=4), "an odd kernel"),
        (lambda: ConvDecoder(8, 4, dim=12, groups=8), "groups that divide"),
    ],
)
def test_decoders_that_cannot_be_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
