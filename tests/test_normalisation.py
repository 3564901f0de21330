import pytest
import torch
from torch.testing import assert_close

from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.errors import UserError
from ssd.normalisation import NAMED, given_normalisation, put_back
from ssd.teachers import Frozen, Preprocessed
from ssd.views.photometry import normalise

DATA = torch.tensor([[0.2, 0.5, 0.7], [0.1, 0.2, 0.3]])


def network(**settings) -> ViT:
    torch.manual_seed(0)
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8} | settings
    return ViT("vit_tiny_patch16_224", img_size=32, arguments=arguments)


def levels(side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_what_was_taken_out_is_put_back():
    pictures = normalise(levels(), DATA[0].tolist(), DATA[1].tolist())
    assert_close(255 * put_back(pictures, DATA), levels().float(), atol=1e-3, rtol=0)
    with pytest.raises(UserError, match="does not say"):
        put_back(pictures, None)


def test_a_batch_says_it_and_so_do_its_slices():
    batch = Batch({"global": torch.zeros(1, 4, 3, 8, 8)}, torch.arange(4), 4, normalisation=DATA)
    assert torch.equal(batch.part(1, 2).normalisation, DATA)
    assert batch.to("meta").normalisation.device.type == "meta"


def test_a_teacher_gets_pictures_as_it_would_have_had_them_from_their_levels():
    shown = Preprocessed(network(), "clip")
    pictures = normalise(levels(), DATA[0].tolist(), DATA[1].tolist())
    found = Frozen(shown)(pictures, (4, 4), DATA, until=1).patches
    with torch.no_grad():
        expected = shown.backbone(normalise(levels(), *NAMED["clip"]), until=1).patches
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    as_they_are = Preprocessed(network(), "data")
    assert_close(as_they_are(pictures, (4, 4), None).patches, as_they_are.backbone(pictures).patches, atol=0, rtol=0)


def test_a_teacher_with_other_patches_gets_pictures_of_the_size_at_which_the_grids_agree():
    """Of 12 px in patches of 4 for a student's grid of 3 x 3."""
    shown = Preprocessed(network(patch_size=4))
    sizes = []
    shown.backbone.register_forward_pre_hook(lambda module, arguments: sizes.append(arguments[0].shape))
    tokens = shown(torch.randn(2, 3, 24, 24), (3, 3), None)
    assert sizes == [(2, 3, 12, 12)] and tokens.grid == (3, 3) and tokens.patches.shape == (2, 9, 24)
    flat = shown(torch.full((1, 3, 24, 24), 0.5), (3, 3), None).patches
    assert_close(flat, shown.backbone(torch.full((1, 3, 12, 12), 0.5)).patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "channels", "said"),
    [
        ("clip", 1, "for 3 channels"),
        ("open_clip", 3, "'imagenet', 'clip'"),
        ({"mean": [0.5], "std": [0.0]}, 1, "std above 0"),
        ({"mean": [0.5]}, 1, "mean: "),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_of_the_setting(given, channels, said):
    with pytest.raises(UserError, match=said) as error:
        given_normalisation(given, channels, "feature_normalize")
    assert "feature_normalize" in str(error.value)
