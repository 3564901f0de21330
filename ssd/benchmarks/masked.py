"""What masked regression saves by not computing: hidden patches, a teacher's last blocks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssd.backbones.vit import ViT
from ssd.benchmarks.paired import Pair, compare
from ssd.benchmarks.step import clock, wait
from ssd.errors import UserError
from ssd.masking.recipes import RandomMasks


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

    def timed(self, name: str, against: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> Pair:
        """Pictures a second of both, under the case's precision."""

        def done(work: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
                    work()
                wait(self.device)

            return run

        settings: dict[str, Any] = {"count": self.batch, "rounds": rounds, "unit": "images/s", "clock": clock()}
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


PARTS = {
    "encoder": "forward and backward pass of visible patches, beside that of all",
    "teacher": "DMAE's teacher stopped where it is tapped, beside run to its end, and to its end on whole pictures",
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
    if part == "encoder":
        return [compare_encoder(case, rounds)]
    return compare_teacher(case, rounds)
