import pytest
import torch
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.mixing import mixed


def test_each_picture_is_mixed_with_the_one_before_it_in_its_group():
    pictures = torch.arange(6.0)[None, :, None]
    expected = torch.tensor([0.5, 0.75, 1.75, 3.5, 3.75, 4.75])
    assert_close(mixed(pictures, 0.75, 3)[0, :, 0], expected)
    assert torch.equal(mixed(pictures, 1.0, 3), pictures)


def test_slices_of_whole_groups_and_views_by_themselves_are_mixed_as_in_the_whole():
    pictures = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = mixed(pictures, 0.3, 2)
    slices = [mixed(part, 0.3, 2) for part in pictures.split(4, dim=1)]
    assert torch.equal(torch.cat(slices, dim=1), whole)
    assert torch.equal(mixed(pictures[1:], 0.3, 2), whole[1:])


@pytest.mark.parametrize("group", [1, 3, 16])
def test_groups_that_do_not_fit_are_refused(group):
    with pytest.raises(UserError, match=f"mixup_group: {group} does not fit the 8 samples"):
        mixed(torch.zeros(1, 8, 1), 0.5, group)
