"""What distillation from frozen teachers and of hidden patches saves by not computing: hidden patches, a teacher's last blocks, a
teacher's pass for each mask."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssd.backbones.vit import ViT
from ssd.batch import Batch
from ssd.benchmarks.paired import Pair, compare
from ssd.benchmarks.step import clock, wait
from ssd.errors import UserError
from ssd.masking.recipes import RandomMasks
from ssd.step import Step
from ssd.views.recipes import CropViews

MASKS = 8  # of a picture, which share what a teacher made of it


@dataclass(frozen=True)
class Case:
    """What is computed.

    Args:
        arguments: of the timm model, for a smaller one.
        ratio: share of patches that is hidden.
        half: under bf16 autocast.
    """

    network: str = "vit_tiny_patch16_224"
    arguments: dict[str, Any] = field(default_factory=dict)
    size: int = 224
    batch: int = 16
    ratio: float = 0.75
    half: bool = False
    device: str = "cpu"

    def name(self) -> str:
        precision = "bf16" if self.half else "float32"
        return f"{self.network.partition('_patch')[0]}, {self.size} px, batch {self.batch}, {precision}"

    def backbone(self) -> ViT:
        torch.manual_seed(0)
        network = ViT(self.network, img_size=self.size, fixed_positions=True, arguments=self.arguments)
        return network.to(self.device)

    def pictures(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, 3, self.size, self.size, generator=generator).to(self.device)

    def visible(self, network: ViT) -> Tensor:
        """(B, n) places."""
        hidden = RandomMasks(self.ratio).draw(1, self.batch, network.grid(self.size, self.size), 0, 0)[0]
        return torch.from_numpy((~hidden).nonzero()[1].reshape(self.batch, -1)).to(self.device)

    def timed(
        self, name: str, against: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, masks: int = 1
    ) -> Pair:
        """Pictures a second of both, as often as they have masks, under the case's precision."""

        def done(work: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
                    work()
                wait(self.device)

            return run

        settings: dict[str, Any] = {"count": self.batch * masks, "rounds": rounds, "unit": "images/s", "clock": clock()}
        return compare(f"{name}, {self.name()}", done(ours), done(theirs), against=against, **settings)


def compare_encoder(case: Case, rounds: int) -> Pair:
    """Forward and backward pass of the visible patches alone, beside that of all."""
    network, pictures = case.backbone().train(), case.pictures()
    visible = case.visible(network)

    def learn(places: Tensor | None) -> None:
        network(pictures, visible=places).patches.square().mean().backward()
        network.zero_grad()

    name = f"encoder, {case.ratio:.0%} hidden"
    return case.timed(name, "all patches", lambda: learn(visible), lambda: learn(None), rounds)


def compare_teacher(case: Case, rounds: int) -> list[Pair]:
    """DMAE's teacher, tapped three quarters of the way through: stopped there beside run to its end, and beside a teacher
    that sees the whole picture."""
    from lightning_modules.dmae import three_quarters

    network, pictures = case.backbone().eval(), case.pictures()
    visible, last = case.visible(network), three_quarters(network)

    @torch.no_grad()
    def stopped() -> None:
        network(pictures, visible=visible, taps=(last,), until=last)

    @torch.no_grad()
    def to_its_end() -> None:
        network(pictures, visible=visible, taps=(last,))

    @torch.no_grad()
    def whole_picture() -> None:
        network(pictures)

    name = f"teacher of {last} of {network.num_blocks} blocks, {case.ratio:.0%} hidden"
    others = {"all blocks": to_its_end, "all blocks, all patches": whole_picture}
    return [case.timed(name, against, stopped, theirs, rounds) for against, theirs in others.items()]


def pass_of(module: Step, case: Case) -> Callable[[], None]:
    """Teacher and student of a method, forward and backward."""
    module.to(case.device).train().begin(1000, 100)
    masks = {kind: plan.draw(case.batch, 0, 0) for kind, plan in module.mask_plans().items()}
    index = torch.arange(case.batch, device=case.device)
    batch = Batch({"global": case.pictures()[None]}, index, case.batch, masks=masks).to(case.device)

    def learn() -> None:
        with torch.no_grad():
            targets = module.targets(batch)
        total: Any = sum(module.losses(batch, targets).values())
        total.backward()
        module.student.zero_grad()

    return learn


def compare_masks(case: Case, rounds: int) -> Pair:
    """data2vec 2.0: several masks that share the teacher's one pass, beside as many passes of one mask. A count is a mask of a
    picture."""
    from lightning_modules.data2vec2 import Data2Vec2

    def learner(number: int) -> Callable[[], None]:
        network = case.backbone()
        layers = min(10, network.num_blocks)
        return pass_of(Data2Vec2(network, views=CropViews(size=case.size), num_masks=number, top_blocks=layers), case)

    together, alone = learner(MASKS), learner(1)

    def one_by_one() -> None:
        for _ in range(MASKS):
            alone()

    name = f"data2vec 2.0, {MASKS} masks of a picture"
    return case.timed(name, f"{MASKS} passes", together, one_by_one, rounds, MASKS)


def compare_curriculum(case: Case, rounds: int) -> Pair:
    """LEAP, with a teacher of the student's size, while its target lies half-way through, beside the teacher's last block."""
    from lightning_modules.leap import LEAP

    def learner(**settings: Any) -> Callable[[], None]:
        views = CropViews(size=case.size)
        return pass_of(LEAP(case.backbone(), case.backbone(), views=views, mixup=False, **settings), case)

    half = max(1, case.backbone().num_blocks // 2)
    early, last = learner(start_block=half), learner(match="last")
    return case.timed(f"LEAP at block {half}", "the last block", early, last, rounds)


PARTS = {
    "encoder": "forward and backward pass of visible patches, beside that of all",
    "teacher": "DMAE's teacher stopped where it is tapped, beside run to its end, and to its end on whole pictures",
    "masks": f"data2vec 2.0's {MASKS} masks that share the teacher's pass, beside a pass for each",
    "leap": "LEAP's teacher stopped half-way through, where its target is on average, beside its last block",
}


def check(case: Case) -> None:
    """Raises UserError for a network or a share that nothing can be measured of."""
    if not 0 < case.ratio < 1:
        raise UserError(f"--ratio is {case.ratio}. It is the share of hidden patches, above 0 and below 1.")
    network = case.backbone()
    if not case.visible(network).shape[1]:
        raise UserError(f"--ratio {case.ratio} leaves none of {network.grid(case.size, case.size)} patches. Use less.")


def measure(part: str, case: Case, rounds: int) -> list[Pair]:
    """The comparisons of one of PARTS."""
    if part == "teacher":
        return compare_teacher(case, rounds)
    return [{"encoder": compare_encoder, "masks": compare_masks, "leap": compare_curriculum}[part](case, rounds)]
