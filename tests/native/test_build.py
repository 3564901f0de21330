"""Compiled once for each kind of machine, done without where it cannot be, and the same on every set of instructions."""

import ctypes
import logging
import os
import platform
import shutil

import numpy as np
import pytest
import torch

from ssd.native import build, masks, views
from ssd.views.parameters import draw_many
from ssd.views.recipes import DINOViews

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, build.COMPILERS)), reason="no C compiler is at hand, so that torch makes the views"
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine that has compiled nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("SSD_NATIVE", "SSD_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for function in (build.library, views.functions, masks.functions):
        function.cache_clear()
    yield tmp_path / "ssd"
    for function in (build.library, views.functions, masks.functions):
        function.cache_clear()


@needs_compiler
def test_what_was_compiled_is_found_again(fresh):
    first = build.compiled()
    made = first.stat().st_mtime_ns
    assert build.compiled() == first and first.stat().st_mtime_ns == made
    assert [file.name for file in fresh.iterdir()] == [first.name], "nothing else is left behind"


@needs_compiler
@pytest.mark.parametrize("changed", ["processor", "version"])
def test_another_processor_or_compiler_gets_its_own(fresh, monkeypatch, changed):
    first = build.compiled()
    monkeypatch.setattr(build, changed, lambda *_: "another")
    assert build.compiled() != first


@pytest.mark.parametrize(
    "compiler, reason", [("no-such-compiler", "no-such-compiler"), ("false", "false failed"), (None, "no C compiler")]
)
def test_without_a_working_compiler_torch_does_it_and_a_line_says_so(fresh, monkeypatch, caplog, compiler, reason):
    if compiler is None:
        monkeypatch.setattr(build, "COMPILERS", ())
        monkeypatch.delenv("CC", raising=False)
    else:
        monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING):
        assert not views.available() and not views.available()
    assert len(caplog.records) == 1 and reason in caplog.records[0].getMessage()
    assert "gcc" in caplog.records[0].getMessage()


def test_it_can_be_turned_off(fresh, monkeypatch, caplog):
    monkeypatch.setenv("SSD_NATIVE", "0")
    assert not views.available() and not caplog.records


@needs_compiler
def test_a_home_that_cannot_be_written_to_does_not_matter(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    assert build.compiled().parent == tmp_path / f"ssd-{os.getuid()}"


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names sets of instructions of x86-64")
@pytest.mark.parametrize("instructions", ["x86-64", "haswell", "native"])
def test_any_set_of_instructions_makes_the_same_picture(instructions, tmp_path, monkeypatch):
    code = tmp_path / "views.so"
    build.compile_to("cc", code, [[f"-march={instructions}"]])
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    recipe = DINOViews(global_size=48, local_size=19, blur_prob=(0.5,) * 3, rotate=10)
    (boxes, colours) = draw_many(recipe, [image.shape[:2]], [(0, 0, 0)])

    def made() -> list[torch.Tensor]:
        pictures = []
        for kind, size in (("global", 48), ("local", 19)):
            crops = torch.empty(boxes[kind].shape[1], 3, size, size, dtype=torch.uint8)
            views.crops(image, boxes[kind][0], crops)
            out = torch.empty(crops.shape)
            views.photometry(crops, torch.from_numpy(colours[kind][0]), [0.5] * 3, [0.2] * 3, out)
            pictures += [crops.float(), out]
        return pictures

    if not views.available():
        pytest.skip("this machine's own code is what the others are compared with")
    expected = made()
    other = ctypes.CDLL(str(code))
    other.ssd_crops.argtypes = views.functions().ssd_crops.argtypes
    other.ssd_photometry.argtypes = views.functions().ssd_photometry.argtypes
    monkeypatch.setattr(views, "functions", lambda: other)
    for ours, theirs in zip(made(), expected, strict=True):
        # a crop's pixel within rounding of a half goes either way, which is a level of it and 0.02 of its colour
        assert ((ours - theirs).abs() > 1e-3).float().mean() < 1e-3
