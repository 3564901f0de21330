import pytest
import torch

from lightning_modules.dinov2 import DINOv2
from ssd.errors import UserError
from ssd.optim import Clip
from ssd.record import describe
from ssd.weights.stages import start_stage
from tests.contract import start
from tests.lightning_modules import test_dinov2 as v2
from tests.lightning_modules import test_dinov3 as v3
from tests.lightning_modules.masked import drawn
from tests.lightning_modules.runs import fit, last, vit
from tests.lightning_modules.test_dinov3 import GRAM


def saved(module, file):
    """As a run would have written it."""
    torch.save({"ssd": {"method": describe(module)}, "state_dict": module.state_dict()}, file)
    return str(file)


@pytest.fixture
def earlier(tmp_path):
    """A few steps of a first stage."""
    module = v3.tiny(lr=1e-2, clip=Clip(3.0))
    optimizers = start(module)
    for step in range(3):
        module.take_step(drawn(module, 4, step), optimizers)
    return module, saved(module, tmp_path / "first.ckpt")


def test_a_gram_stage_begins_with_the_networks_of_the_last_and_their_teacher_as_anchor(earlier):
    before, file = earlier
    module = v3.tiny(views=GRAM, gram_anchor="start", start_from=file)
    start_stage(module, file)
    module.begin_fresh()
    old, new = before.state_dict(), module.state_dict()
    shared = [name for name in old if name != "_extra_state"]
    assert all(torch.equal(old[name], new[name]) for name in shared)
    anchor = module.gram_teacher.network.state_dict()
    assert all(torch.equal(value, anchor[name]) for name, value in before.teacher.network.backbone.state_dict().items())
    assert module.step == 0 and before.step == 3


def test_the_anchor_may_be_any_checkpoint_and_the_run_another(earlier, tmp_path):
    before, file = earlier
    module = v3.tiny(views=GRAM, gram_anchor=file)
    module.begin_fresh()
    anchor = module.gram_teacher.network.state_dict()
    assert all(torch.equal(value, anchor[name]) for name, value in before.teacher.network.backbone.state_dict().items())


def test_a_gram_teacher_is_left_behind_where_the_next_stage_has_none(earlier, tmp_path):
    _, file = earlier
    gram = v3.tiny(gram_anchor="start", start_from=file)
    start_stage(gram, file)
    second = saved(gram, tmp_path / "second.ckpt")
    start_stage(v3.tiny(start_from=second), second)


def test_other_methods_and_sizes_are_refused_with_a_list(earlier):
    _, file = earlier
    with pytest.raises(UserError, match=r"was made by DINOv3, and this run is DINOv2.*backbone\.weights"):
        start_stage(v2.tiny(), file)
    with pytest.raises(UserError, match=r"start_from .* of another shape: .*head.*last_layer"):
        start_stage(v3.tiny(num_prototypes=16), file)


def test_a_run_starts_from_a_checkpoint_and_goes_on_without_it(tmp_path):
    """The file is read where the run begins; after that its checkpoints hold all there is."""

    def build(**settings):
        return vit(DINOv2, **{"koleo_group": 4, "patch_head_bottleneck_dim": 8, "steps": 4, "lr": 1e-3} | settings)

    first = build()
    fit(tmp_path / "first", first)
    second = build(
        start_from=str(last(tmp_path / "first")), lr=0.0, weight_decay=0.0, momentum=1.0, target_rule="centering"
    )
    fit(tmp_path / "second", second)
    ours, theirs = second.state_dict(), first.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith(("student.", "teacher.")))
    last(tmp_path / "first").unlink()
    again = build(start_from=str(last(tmp_path / "first")), steps=4)
    fit(tmp_path / "third", again, resume=last(tmp_path / "second"))
    assert again.step == 4
