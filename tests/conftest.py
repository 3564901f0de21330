"""Fixtures that many tests share: one pair of processes, and where real data lies."""

import os
import tempfile
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import settings

torch.set_num_threads(1)

# where a change is judged, a property is asked of the same examples each time; elsewhere of new ones
settings.register_profile("judged", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("judged")


def serve(rank: int, world: int, store: str, pipe) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        job = pipe.recv()
        if job is None:
            break
        function, arguments = job
        try:
            pipe.send((True, function(rank, world, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Pair:
    """Two processes in one gloo group, kept for the whole session because starting them costs seconds."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(2):
            mine, theirs = context.Pipe()
            store = os.path.join(self.folder.name, "store")
            process = context.Process(target=serve, args=(rank, 2, store, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function, *arguments, timeout_s: float = 120):
        """`function(rank, world, *arguments)` in both; the two results. Fails with the traceback of either.

        A failure on one leaves the other waiting in a reduction, so both are then replaced.
        """
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers: dict[int, object] = {}
        while len(answers) < 2:
            ready = wait([pipe for rank, pipe in enumerate(self.pipes) if rank not in answers], timeout_s)
            for pipe in ready:
                rank = self.pipes.index(pipe)
                good, answers[rank] = pipe.recv()
                if not good:
                    self.restart()
                    pytest.fail(f"in process {rank}:\n{answers[rank]}")
            if not ready:
                self.restart()
                pytest.fail(f"no answer within {timeout_s:g} s")
        return [answers[0], answers[1]]

    def restart(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()
        self.start()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
        self.folder.cleanup()


@pytest.fixture(scope="session")
def pair():
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("SSD_DATA", Path(__file__).parent.parent / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data is not at {folder}; name its folder in SSD_DATA")
    return folder
