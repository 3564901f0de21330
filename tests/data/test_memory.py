"""A loader's memory is flat over thousands of batches, in this process and in its workers."""

import os
from pathlib import Path

import numpy as np
import pytest

from datamodules.images import Images
from ssd.views.recipes import DINOViews
from tests.data.files import encoded, scene, write

BATCHES = 20_000
VIEWS = DINOViews(global_size=16, local_count=2, local_size=8)


def resident_mib(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux for the memory of a process")
def test_memory_is_flat_over_twenty_thousand_batches(tmp_path):
    """Files, opened and decoded each time, some of them broken; measured from the thousandth batch on."""
    for number in range(1000):
        write(tmp_path / f"{number:04}.jpg", encoded(scene(24, 24, number), "JPEG") if number % 100 else b"broken")
    data = Images(tmp_path, labels=False, batch_size=4, num_workers=2, cache=False, max_broken_share=0.05)
    data.prepare(VIEWS)
    loader = data.train_dataloader()
    taken, measured = 0, []
    while taken < BATCHES:
        for _ in loader:
            taken += 1
            if taken % 1000 == 0:
                workers = [worker.pid for worker in loader._iterator._workers]
                measured.append([resident_mib(process) for process in (os.getpid(), *workers)])
    table = np.array(measured)  # (20, 3)
    print("MiB of this process and two workers, every 1,000 batches:\n", table.round(1))
    growth = table[-5:].mean(0) - table[:5].mean(0)
    # 15,000 batches of 30 kB: of 450 MiB less than one in a hundred is kept
    assert (growth < 4).all(), f"grown by {growth.round(1)} MiB over {BATCHES * 3 // 4} batches"
