import numpy as np
import torch
from torch.testing import assert_close

from ssd.views.geometry import crop_into
from ssd.views.overlap import sampled, shared_places


def box(left, top, width, height, flip=0.0):
    return torch.tensor([[left, top, width, height, flip]], dtype=torch.float32)


def test_worked_example():
    """[0, 8] and [4, 12] share [4, 8]: from 0 to 1 in the one, from -1 to 0 in the other, two places at a quarter and three."""
    one, other, valid = shared_places(box(0, 0, 8, 8), box(4, 0, 8, 8), (1, 2))
    assert_close(one[0, 0], torch.tensor([[0.25, 0.0], [0.75, 0.0]]))
    assert_close(other[0, 0], torch.tensor([[-0.75, 0.0], [-0.25, 0.0]]))
    assert valid.tolist() == [True]


def test_the_same_view_and_its_mirror_image_meet_at_the_same_places():
    plain, mirrored, _ = shared_places(box(3, 5, 10, 6), box(3, 5, 10, 6, 1.0), (2, 3))
    assert_close(mirrored[..., 0], -plain[..., 0])
    assert_close(mirrored[..., 1], plain[..., 1])


def test_views_with_little_or_nothing_in_common_are_left_out():
    first = box(0, 0, 10, 10).expand(4, 5)
    others = torch.cat([box(9, 0, 10, 10), box(9.1, 0, 10, 10), box(20, 20, 5, 5), box(2, 2, 2, 2)])
    assert shared_places(first, others, (2, 2))[2].tolist() == [True, False, False, True]


def test_two_crops_of_one_picture_show_the_same_at_shared_places():
    """A picture that is smooth, cropped, resized and flipped as data does it."""
    down, across = np.mgrid[0:64, 0:64]
    picture = np.stack([across * 3, down * 3, across + down], axis=-1).astype(np.uint8)
    boxes = np.array([[4, 10, 40, 32, 0], [16, 6, 36, 48, 1]], dtype=np.float32)
    views = torch.empty(2, 3, 32, 32, dtype=torch.uint8)
    crop_into(picture, boxes, views)
    one, other = torch.from_numpy(boxes).split(1)
    first, second, valid = shared_places(one, other, (6, 6))
    assert valid.all()
    seen = [sampled(view[None], places) for view, places in zip(views, (first, second), strict=True)]
    assert_close(seen[0], seen[1], atol=1.5, rtol=0)  # of values up to 189, two of 8 bits after two resizings
    unflipped = shared_places(one, torch.from_numpy(boxes[1:] * [1, 1, 1, 1, 0]).float(), (6, 6))[1]
    assert (sampled(views[1:], unflipped) - seen[0]).abs().max() > 20
