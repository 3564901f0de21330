import torch

from ssd.diagnosis.networks import Watch, copies, diagnose_networks, moved, sampled_weights, storage
from tests.lightning_modules.runs import convnet, vit


def kinds(module):
    return [finding.kind for finding in diagnose_networks(module, module.build_optimizers(), 0)]


def test_every_method_begins_with_networks_that_are_apart():
    assert kinds(convnet().train()) == [] and kinds(vit(drop_path_rate=0.5).train()) == []


def test_parts_of_one_block_of_memory_are_apart_and_equal_parts_are_not():
    block = torch.zeros(10)
    assert storage(block[:5]) != storage(block[5:]) and storage(block[2:4]) == storage(block[2:])


def test_a_teacher_in_the_optimiser_is_named_though_it_asks_for_no_gradient():
    module = vit().train()
    optimizer = torch.optim.SGD([next(module.teacher.parameters())], lr=0.1)
    (finding,) = diagnose_networks(module, [optimizer], 3)
    assert finding.kind == "teacher-trained" and "is given to the optimiser" in finding.message


def test_the_watch_sees_each_change_once():
    module = convnet().train()
    watch = Watch(module)
    assert watch.changed() and not watch.changed()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)  # what training does
    assert not watch.changed()
    changes = (
        lambda: module.teacher.network.backbone.eval(),
        lambda: next(module.teacher.parameters()).requires_grad_(True),
        lambda: setattr(next(module.teacher.parameters()), "data", next(module.student.parameters()).data),
        lambda: setattr(module.teacher, "network", module.student),
    )
    for change in changes:
        change()
        assert watch.changed() and not watch.changed()


def test_layers_are_sampled_over_the_whole_depth_and_their_changes_are_shares_of_their_length():
    module = vit()
    weights = sampled_weights(module.student)
    assert len(weights) == 8 and all(weight.ndim > 1 for weight in weights.values())
    assert next(iter(weights)).startswith("backbone") and any("head" in name for name in weights)
    before = copies(weights.values())
    with torch.no_grad():
        for number, weight in enumerate(weights.values()):
            weight.mul_(1 + 0.01 * number)
    torch.testing.assert_close(moved(before, copies(weights.values())), 0.01 * torch.arange(8.0), atol=1e-5, rtol=1e-4)
