import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from ssd.batch import Batch, Masks, Rows, Scores, Targets, Tokens, Whole


def batch(samples=8):
    torch.manual_seed(0)
    return Batch(
        views={"global": torch.randn(2, samples, 3, 4, 4), "local": torch.randn(3, samples, 3, 2, 2)},
        index=torch.arange(samples),
        total=2 * samples,
        label=torch.arange(samples),
        masks={"global": Masks(torch.rand(2, samples, 4) > 0.5)},
        boxes={"global": torch.randn(2, samples, 5)},
        photometry={"local": torch.randn(3, samples, 11)},
    )


def test_slices_put_together_are_the_whole():
    whole = batch()
    parts = [whole.part(number, 4) for number in range(4)]
    for name in whole.views:
        assert torch.equal(torch.cat([part.views[name] for part in parts], 1), whole.views[name])
    assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
    assert torch.equal(torch.cat([part.label for part in parts]), whole.label)
    assert torch.equal(torch.cat([part.masks["global"].boolean for part in parts], 1), whole.masks["global"].boolean)
    assert torch.equal(torch.cat([part.boxes["global"] for part in parts], 1), whole.boxes["global"])
    assert torch.equal(torch.cat([part.photometry["local"] for part in parts], 1), whole.photometry["local"])
    assert all(part.total == 16 and len(part) == 2 for part in parts), "losses divide by the whole step's count"


def test_slices_share_memory_with_the_whole():
    whole = batch()
    assert whole.part(1, 2).views["global"].data_ptr() == whole.views["global"][:, 4:].data_ptr()


def test_unequal_slices_are_refused():
    with pytest.raises(ValueError, match="8 rows do not divide into 3"):
        batch().part(0, 3)


def test_everything_moves_together():
    moved = batch().to("meta")
    tensors = [*moved.views.values(), moved.index, moved.label, moved.masks["global"].boolean, *moved.boxes.values()]
    assert all(t.device.type == "meta" for t in tensors)
    assert moved.total == 16


def test_flat_masks_name_the_same_tokens_in_slices_and_in_the_whole():
    """2 views, 4 samples, 3 tokens, 2 slices: each slice's indices, moved to the whole, pick the same tokens."""
    tokens = torch.arange(2 * 4 * 3).view(2, 4, 3)
    masks = Masks(
        boolean=torch.zeros(2, 4, 3, dtype=torch.bool),
        flat=tensor([[0, 5, 11], [2, 6, 0]]),
        weight=tensor([[1.0, 0.5, 0.5], [1.0, 1.0, 0.0]]),
    )
    in_slices = []
    for number in range(2):
        part = masks.part(number, 2)
        slice_tokens = tokens[:, 2 * number : 2 * number + 2]
        in_slices.append(slice_tokens.flatten()[part.flat[0]])
        assert torch.equal(part.flat_in_whole(), part.flat[0])
    assert torch.equal(tokens.flatten()[masks.flat_in_whole()], torch.cat(in_slices))
    with pytest.raises(ValueError, match="drawn for 2 slices"):
        masks.part(0, 4)


def test_targets_are_cut_as_they_say():
    targets = Targets(
        probs=torch.arange(16).view(2, 8), tokens=Rows(torch.arange(12)), prototypes=Whole(torch.arange(5))
    )
    part = targets.part(1, 4)
    assert part.probs.tolist() == [[2, 3], [10, 11]]
    assert part.tokens.tolist() == [3, 4, 5]
    assert part.prototypes.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(AttributeError, match="no 'logits'"):
        _ = part.logits
    assert not hasattr(part, "logits")


def test_pooled_is_the_class_token_then_own_pooling_then_the_mean_of_real_patches():
    patches = torch.randn(2, 3, 4)
    valid = tensor([[True, True, False], [True, True, True]])
    assert_close(Tokens(patches, (3,)).pooled(), patches.mean(1))
    assert_close(Tokens(patches, (3,), valid=valid).pooled()[0], patches[0, :2].mean(0))
    summary, cls = torch.randn(2, 4), torch.randn(2, 4)
    assert Tokens(patches, (3,), summary=summary).pooled() is summary
    assert Tokens(patches, (3,), summary=summary, cls=cls).pooled() is cls


def test_scores_become_logits_only_when_asked():
    scores = Scores(torch.randn(6, 4), torch.randn(10, 4))
    assert_close(scores.unflatten(0, (2, 3))[1].logits(), (scores.features @ scores.prototypes.T)[3:])


def test_lifted_masks_keep_their_shapes_and_mask_nothing():
    masks = Masks(torch.ones(2, 4, 3, dtype=torch.bool), flat=tensor([[0, 5, 11]]), weight=tensor([[1.0, 0.5, 0.5]]))
    lifted = masks.lifted()
    assert not lifted.boolean.any() and not lifted.token_weight().any()
    assert torch.equal(lifted.flat_in_whole(), masks.flat_in_whole())
    assert masks.boolean.all(), "the masks themselves are as they were"
