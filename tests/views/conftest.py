"""What holds for views holds for both ways of making them on a CPU."""

import pytest

from ssd.native import views as native

BOTH = ("test_geometry", "test_photometry")


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.rpartition(".")[2] in BOTH:
        metafunc.parametrize("made_by", ["compiled", "torch"], indirect=True)


@pytest.fixture(autouse=True)
def made_by(request, monkeypatch):
    """Compiled code or torch; without a parameter, whatever this machine has."""
    way = getattr(request, "param", None)
    if way == "compiled" and not native.available():
        pytest.skip("no C compiler is at hand, so that torch makes the views")
    if way == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
    return way
