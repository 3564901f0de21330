import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score
from torch.testing import assert_close

from ssd.errors import UserError
from ssd.evaluation.patches import scaling
from ssd.evaluation.segmentation import (
    Segmented,
    class_shares,
    knn_segmentation,
    linear_segmentation,
    pixel_confusion,
    segmentation_numbers,
    train_layers,
)


def stripes(pictures, grid=4, patch=4, seed=0):
    """Maps of three classes in horizontal bands as high as patches, (N, H, W), and each patch's class (N, P)."""
    random = torch.Generator().manual_seed(seed)
    bands = torch.randint(3, (pictures, grid), generator=random)
    maps = bands.repeat_interleave(patch, 1)[:, :, None].expand(-1, -1, grid * patch)
    return maps.contiguous().to(torch.uint8), bands.repeat_interleave(grid, 1)


def oracle(classes, width=3):
    """Features that say the class of each patch. (N, P, D) float16"""
    return F.one_hot(classes, width).half()


def test_features_that_know_the_class_get_every_pixel_right():
    train_maps, train = stripes(20)
    test_maps, test = stripes(10, seed=1)
    for number in segmentation_numbers(oracle(train), train_maps, oracle(test), test_maps, (4, 4), min_steps=60):
        assert number.value == 1.0 and number.chance < 0.5
    assert number.name == "segmentation/knn/class_accuracy"


def test_shapes_of_pixels_are_found_where_patches_are_pixels():
    """Any shape at all, on a grid as fine as the picture."""
    random = torch.Generator().manual_seed(0)
    maps = torch.randint(3, (12, 6, 6), generator=random).to(torch.uint8)
    features = oracle(maps.long().flatten(1))
    both = (features[:8], maps[:8], features[8:], maps[8:], (6, 6), 3)
    assert linear_segmentation(*both, min_steps=60).miou == knn_segmentation(*both).miou == 1.0


def test_features_that_know_nothing_are_at_chance():
    train_maps, _ = stripes(30)
    test_maps, _ = stripes(30, seed=1)
    noise = torch.randn(60, 16, 8, generator=torch.Generator().manual_seed(0)).half()
    for number in segmentation_numbers(noise[:30], train_maps, noise[30:], test_maps, (4, 4), min_steps=60):
        if number.name.endswith("pixel_accuracy"):
            # 120 bands of 30 test pictures: a deviation of 0.043 at the most
            assert number.value < number.chance + 0.1
            assert number.chance == pytest.approx(
                torch.bincount(test_maps.flatten().long()).max().item() / test_maps.numel()
            )


def test_scores_from_pixels_are_those_of_scikit_learn():
    random = torch.Generator().manual_seed(0)
    maps = torch.randint(4, (3, 8, 8), generator=random).to(torch.uint8)
    maps[:, :2] = 255
    scores = torch.randn(3, 64, 4, generator=random)
    found = Segmented(pixel_confusion(scores, maps, (8, 8)))
    counted = maps != 255
    truth, answers = maps[counted].numpy(), scores.argmax(2).view(3, 8, 8)[counted].numpy()
    assert found.iou.tolist() == pytest.approx(jaccard_score(truth, answers, average=None).tolist())
    assert found.miou == pytest.approx(jaccard_score(truth, answers, average="macro"))
    assert found.pixel_accuracy == pytest.approx((truth == answers).mean())
    assert found.accuracies[2].item() == pytest.approx((answers[truth == 2] == 2).mean())


def test_a_class_that_is_nowhere_does_not_count_and_one_answered_wrongly_does():
    matrix = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]])
    found = Segmented(matrix)
    assert found.iou[:2].tolist() == [0.75, 0] and found.iou[2].isnan()
    assert found.miou == 0.375 and found.pixel_accuracy == 0.75


def test_shares_of_classes_in_patches():
    labels = torch.tensor([[0, 0, 1, 255], [0, 2, 255, 255]], dtype=torch.uint8)[None]
    assert_close(class_shares(labels, (1, 2), 3), torch.tensor([[[0.75, 0, 0.25], [0, 0.25, 0]]]))
    # five pixels over two patches: the middle one's centre lies on the border, and counts for the second
    line = torch.tensor([[[0, 0, 1, 1, 1]]], dtype=torch.uint8)
    assert_close(class_shares(line, (1, 2), 2), torch.tensor([[[1.0, 0], [0, 1.0]]]))


def test_pixels_without_a_label_teach_nothing():
    """Patches whose own and whose neighbours' pixels have no label may hold anything."""
    maps, classes = stripes(8)
    features = oracle(classes) + 0.3 * torch.randn(8, 16, 3, generator=torch.Generator().manual_seed(0)).half()
    maps[:, :8] = 255  # two of four rows of patches; the second is mixed into the third's quarters
    changed = features.clone()
    changed[:, :4] = 9.0
    rows, mean, factor = torch.arange(8), torch.zeros(3), torch.ones(3)
    first, second = (
        train_layers(x, maps, rows, (4, 4), 3, (0.1,), mean, factor, min_steps=20) for x in (features, changed)
    )
    assert torch.equal(first.weight, second.weight)
    voted = [knn_segmentation(x, maps, features, maps, (4, 4), 3, k=3).matrix for x in (features, changed)]
    assert torch.equal(*voted)


def test_layers_trained_at_once_are_those_of_torch_optim():
    maps, classes = stripes(6)
    maps[0, :5] = 255
    features = (oracle(classes) + torch.randn(6, 16, 3, generator=torch.Generator().manual_seed(0))).half()
    rates = (0.01, 0.3)
    zeros, ones = torch.zeros(3), torch.ones(3)
    heads = train_layers(
        features, maps, torch.arange(6), (4, 4), 3, rates, zeros, ones, epochs=1, min_steps=5, batch_size=6
    )
    shares = class_shares(maps, (8, 8), 3).mT.unflatten(2, (8, 8))
    for group, rate in enumerate(rates):
        layer = torch.nn.Linear(3, 3)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimiser = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 5)
        for _ in range(5):
            optimiser.zero_grad()
            planes = layer(features.float()).mT.unflatten(2, (4, 4))
            planes = F.interpolate(planes, scale_factor=2, mode="bilinear")
            losses = F.cross_entropy(planes, shares / shares.sum(1, keepdim=True).clamp_min(1e-9), reduction="none")
            counted = shares.sum(1)
            ((losses * counted).sum() / counted.sum()).backward()
            optimiser.step()
            schedule.step()
        assert_close(heads.weight[group].T, layer.weight.detach(), atol=1e-5, rtol=1e-4)
        assert_close(heads.bias[group], layer.bias.detach(), atol=1e-5, rtol=1e-4)


def test_neighbours_vote_with_what_is_in_them():
    """Two patches of the bank are as near: 3/4 + 1/4 of class 0 against 1/4 + 3/4 of class 1, and half of it for k 1."""
    maps = torch.tensor([[[0, 0, 1, 1], [0, 1, 1, 0]]], dtype=torch.uint8)  # patches: 3/4 of 0, 3/4 of 1
    bank = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).half()
    asked = torch.tensor([[[1.0, 0.1], [0.1, 1.0]]]).half()
    truth = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]], dtype=torch.uint8)
    found = knn_segmentation(bank, maps, asked, truth, (1, 2), 2, k=1)
    assert found.matrix.tolist() == [[4, 0], [0, 4]]


def test_the_rate_is_chosen_without_the_test_set():
    train_maps, train = stripes(20)
    features = oracle(train) + torch.randn(20, 16, 3, generator=torch.Generator().manual_seed(0)).half()
    test_maps, _ = stripes(10, seed=1)
    settings = {
        linear_segmentation(features, train_maps, asked, test_maps, (4, 4), 3, min_steps=50).setting
        for asked in (features[:10], 100 * features[10:])
    }
    assert len(settings) == 1


def test_scaling_over_patches_is_that_over_all_rows():
    features = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)).half()
    features[:, :, 1] = 2
    mean, factor = scaling(features)
    rows = features.float().flatten(0, 1)
    assert_close(mean, rows.mean(0))
    assert_close(1 / factor[[0, 2]], rows.std(0, correction=0)[[0, 2]])
    assert factor[1] == 0


def test_what_does_not_fit_is_said():
    maps, classes = stripes(4)
    features = oracle(classes)
    with pytest.raises(
        UserError, match="4 training pictures of 16 patches do not fit 3 label maps and a grid of 4 x 4"
    ):
        segmentation_numbers(features, maps[:3], features, maps, (4, 4))
    with pytest.raises(UserError, match="a grid of 2 x 4"):
        segmentation_numbers(features, maps, features, maps, (2, 4))
    with pytest.raises(UserError, match="no pixel of the 4 test label maps"):
        segmentation_numbers(features, maps, features, torch.full_like(maps, 255), (4, 4))
    with pytest.raises(UserError, match="two training pictures"):
        segmentation_numbers(features[:1], maps[:1], features, maps, (4, 4))
    with pytest.raises(UserError, match="NaN or infinite"):
        segmentation_numbers(features * float("nan"), maps, features, maps, (4, 4))
