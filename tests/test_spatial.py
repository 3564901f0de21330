import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.projection import Projection
from ssd.record import build, describe
from ssd.spatial import MapAttention, PixelHead, SpatialReLU, spatial_adaptor


def trained(widths=(16, 48, 8), **settings) -> Projection:
    """Statistics and gains that are not those of a start."""
    torch.manual_seed(0)
    head = Projection(widths, **settings)
    for layer in head:
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            if layer.affine:
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
    return head


def maps(count: int = 4, width: int = 16) -> Tensor:
    return torch.randn(count, width, 7, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", [{}, {"widths": (16, 48, 48, 8)}, {"bias": True, "last_norm": False}])
def test_pooling_what_the_adapted_head_answers_is_what_the_head_answers_to_the_pooled(settings):
    head = trained(**settings)
    with torch.no_grad():
        found = spatial_adaptor(head)(maps()).mean((2, 3))
        assert_close(found, head(maps().mean((2, 3))), atol=1e-6, rtol=1e-6)


def test_a_plain_relu_at_every_place_is_far_from_that():
    head = trained()
    plain = spatial_adaptor(head)
    plain[2] = nn.ReLU()
    with torch.no_grad():
        apart = (plain(maps()).mean((2, 3)) - head(maps().mean((2, 3)))).abs().max()
    assert apart > 5e-2


def test_a_channel_is_kept_whole_or_not_at_all():
    given = torch.tensor([[[[-1.0, 3.0]], [[1.0, -3.0]], [[1.0, -1.0]]]])
    assert torch.equal(SpatialReLU()(given), torch.tensor([[[[-1.0, 3.0]], [[0.0, -0.0]], [[0.0, -0.0]]]]))


def test_the_adapted_head_shares_nothing_with_the_head():
    head = trained()
    adapted, before = spatial_adaptor(head), head[0].weight.clone()
    nn.init.zeros_(adapted[0].weight)
    assert torch.equal(head[0].weight, before)
    assert not any(layer.training for layer in adapted)


@pytest.mark.parametrize("layer", [nn.GELU(), nn.LayerNorm(8), nn.BatchNorm1d(8, track_running_stats=False)])
def test_layers_that_pooling_does_not_commute_with_are_refused(layer):
    with pytest.raises(UserError, match=f"a head with {type(layer).__name__} cannot"):
        spatial_adaptor(nn.Sequential(nn.Linear(8, 8), layer))


def test_attention_is_the_equation_and_knows_places():
    torch.manual_seed(0)
    block = MapAttention(16, 2)
    given = maps(2)
    tokens = given.flatten(2).mT
    from ssd.backbones.positions import sincos_positions

    x = F.layer_norm(tokens, (16,), block.norm.weight, block.norm.bias) + sincos_positions((7, 7), 16)
    q, k, v = block.attention.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    mixed = (torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v).transpose(1, 2).flatten(2)
    assert_close(block(given), (tokens + block.attention.proj(mixed)).mT.unflatten(2, (7, 7)), atol=1e-5, rtol=1e-5)
    order = torch.randperm(49)
    turned = block(given.flatten(2)[:, :, order].unflatten(2, (7, 7))).flatten(2)
    assert (turned - block(given).flatten(2)[:, :, order]).abs().max() > 1e-3
    with pytest.raises(UserError, match="attention_heads: 3 do not divide the 16"):
        MapAttention(16, 3)


def test_the_students_head_has_the_published_layers():
    head = PixelHead(512, 4096, 256)
    kinds = [(type(layer).__name__, getattr(layer, "out_channels", None)) for layer in head]
    wide = [("Conv2d", 4096), ("BatchNorm2d", None), ("ReLU", None)]
    narrow = [("Conv2d", 256), ("BatchNorm2d", None)]
    assert kinds == [*wide, *narrow, *wide, *narrow]
    assert [layer.affine for layer in head if isinstance(layer, nn.BatchNorm2d)] == [True, False, True, False]
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Conv2d))
    plain = PixelHead(8, 16, 4, batch_norm=False)
    assert plain(torch.randn(1, 8, 2, 2)).shape == (1, 4, 2, 2)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in plain)


# ------------------------------------------------------------------ projectors of published files


def test_a_projector_is_read_from_a_file_of_moco_v3_and_from_any_other_by_name(tmp_path):
    head = trained()
    published = {f"module.momentum_encoder.fc.{key}": value for key, value in head.state_dict().items()}
    published |= {f"module.base_encoder.fc.{key}": value + 1 for key, value in head.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": published}, tmp_path / "moco.pth.tar")
    torch.save({f"module.projector.{key}": value for key, value in head.state_dict().items()}, tmp_path / "other.pth")
    for weights in (f"{tmp_path}/moco.pth.tar", f"{tmp_path}/other.pth#module.projector"):
        found = Projection((16, 48, 8), weights=weights)
        assert all(torch.equal(value, found.state_dict()[key]) for key, value in head.state_dict().items())
        rebuilt = build(describe(found))
        assert [layer.weight.shape for layer in rebuilt if isinstance(layer, nn.Linear)] == [(48, 16), (8, 48)]
    assert not found.train().training
    with pytest.raises(UserError, match="of another shape"):
        Projection((16, 32, 8), weights=str(tmp_path / "moco.pth.tar"))
    with pytest.raises(UserError, match=r"no layers under 'elsewhere'"):
        Projection((16, 48, 8), weights=f"{tmp_path}/other.pth#elsewhere")
    with pytest.raises(UserError, match="widths"):
        Projection((16,))
