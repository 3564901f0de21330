import pytest
import torch
from torch import nn

from ssd.batch import Tokens
from ssd.errors import UserError
from ssd.evaluation import patches
from ssd.evaluation.patches import extract_patches, in_parts


class Cut(nn.Module):
    """Patches of 2 x 2 pixels, scaled where the module is in training mode."""

    def forward(self, pictures):
        assert not torch.is_grad_enabled()
        values = pictures.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # (B, 1, 2, 2, 4)
        return Tokens(patches=values.flatten(1, 3) * (1 + self.training), grid=values.shape[2:4])


def loader(batches=3, size=4):
    for number in range(batches):
        index = torch.arange(2) + 2 * number
        yield {"sample": torch.randn(2, 1, size, size) + number, "label": index % 3, "index": index}
    yield {"sample": torch.zeros(0, 1, size, size), "label": index[:0], "index": index[:0]}


@pytest.mark.parametrize("in_file", [False, True])
def test_patches_come_in_the_loaders_order_in_eval_mode(tmp_path, in_file):
    batches = list(loader())
    network = Cut().train()
    found = extract_patches(network, batches, file=tmp_path / "patches" if in_file else None)
    assert network.training and found.grid == (2, 2) and found.features.dtype == torch.float16
    assert torch.equal(found.index, torch.arange(6)) and torch.equal(found.labels, torch.arange(6) % 3)
    whole = torch.cat([batch["sample"] for batch in batches])
    torch.testing.assert_close(found.features[:, 1].float(), whole[:, 0, :2, 2:].flatten(1), atol=4e-3, rtol=1e-3)


def test_parts_are_the_whole_in_order(monkeypatch):
    features = torch.randn(5, 3, 2).half()
    monkeypatch.setattr(patches, "NUMBERS_AT_ONCE", 12)
    parts = list(in_parts(features))
    assert [len(part) for _, part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part for _, part in parts]), features.float())
    assert all(torch.equal(features[rows].float(), part) for rows, part in parts)


def test_what_patches_cannot_be_had_of_is_said():
    with pytest.raises(UserError, match="not finite in 16 bits"):
        extract_patches(lambda x: Tokens(patches=torch.full((len(x), 4, 2), 1e5), grid=(2, 2)), list(loader()))
    with pytest.raises(UserError, match="gave no pictures"):
        extract_patches(Cut(), [])
    with pytest.raises(UserError, match="one length"):
        extract_patches(Cut(), [*loader(), *loader(size=6)])
    with pytest.raises(UserError, match="one length"):
        extract_patches(
            lambda x: Tokens(patches=torch.zeros(2, 4, 2), grid=(4,), valid=torch.ones(2, 4).bool()), list(loader())
        )
