"""The page: whole in itself, first things first, and read by a browser."""

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from ssd.report.page import page
from ssd.report.reading import read_run
from tests.report.runs import CONFIG, facts, png, write_run

CHROMIUM = next(
    (found for name in ("chromium", "google-chrome", "chromium-browser") if (found := shutil.which(name))), None
)


class Parts(HTMLParser):
    """Attributes that could load something, text, and whether tags are closed as they are opened."""

    ALONE = ("meta", "link", "img", "br", "input", "line", "polyline", "polygon", "circle")

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def whole(tmp_path):
    pictures = {"views": [0], "components": [10, 20, 30]}
    finding = {
        "kind": "dead-prototypes",
        "step": 20,
        "message": "9 of 32 are <never> used.",
        "advice": "fewer of them",
        "term": "dino",
    }
    folder = write_run(tmp_path / "whole", pictures=pictures)
    (folder / "more.json").write_text(json.dumps({"findings": [finding]}))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best.ckpt").write_bytes(b"")
    (folder / "export").mkdir()
    return read_run(folder)


def test_nothing_is_asked_of_the_network_or_of_other_files(whole):
    text = page([whole])
    parts = Parts(text)
    assert parts.open == [] and parts.loads, "well formed"
    assert all(load.startswith("data:") for load in parts.loads)
    assert "@import" not in text and not re.search(r"url\(", text) and "http" not in text
    assert not {"iframe", "object", "embed", "base"} & set(parts.tags)


def test_a_reader_sees_the_verdict_first(whole):
    text = Parts(page([whole])).text
    assert "DINO trained resnet18 (1.2 M parameters) on Digits, 1,297 samples, for 30 steps in 2 min" in text
    verdict = "85.0 % of held-out samples right by a linear probe on 1 % of the labels: +25.0 points over raw pixels (60.0 %) and"
    assert verdict in text and "+45.0 points over the untrained network (40.0 %)" in text
    places = [
        text.index(word)
        for word in ("finished", verdict, "Results", "Curves", "Pictures", "fingerprint", "How to load")
    ]
    assert places == sorted(places)


def test_it_says_what_was_found_what_it_ran_on_and_how_to_load_it(whole):
    text = Parts(page([whole])).text
    for said in (
        "dead prototypes at step 20, term dino",
        "fewer of them",
        "9 of 32 are <never> used.",
        "<b>one</b>, two",
        "abc123",
        "0123456789ab",
        "knn-v1 k=20",
        "10.4 %",
        "2026-01-02 03:04:05 UTC",
        "ssd export",
        "local-dir:",
        "num_prototypes: 32",
        "checkpoints/best.ckpt cannot be read",
    ):
        assert said in text, said


def test_names_from_files_are_text_and_no_markup(whole):
    markup = page([whole], title="<script>alert(1)</script>")
    assert Parts(markup).tags.count("script") == 1 and "&lt;never&gt;" in markup


def test_several_runs_stand_side_by_side_with_what_differs(tmp_path):
    other = copy.deepcopy(CONFIG)
    other["model"]["init_args"]["num_prototypes"] = 64
    better = [{"name": "knn/top1", "value": 0.95}]
    runs = [
        read_run(write_run(tmp_path / "small", pictures={"views": [0]})),
        read_run(write_run(tmp_path / "wide", [2.5, 2.0, 1.0], config=other, summary={"numbers": better})),
    ]
    markup = page(runs)
    text = Parts(markup).text
    assert "By kNN, wide is ahead with 95.0 % , 5.0 points before small (one run of each)" in text
    assert re.search(r"model\.num_prototypes 32 64", text) and "trainer.default_root_dir" not in text.split("Curves")[0]
    assert 'class="line run-0"' in markup and 'class="line run-1"' in markup


def test_seeds_share_a_colour_and_runs_on_other_data_are_not_ranked(tmp_path):
    runs = []
    for seed in range(3):
        config = copy.deepcopy(CONFIG)
        config["seed_everything"] = seed
        runs.append(read_run(write_run(tmp_path / f"seed{seed}", [3.0, 2.0 + seed, 1.5], config=config)))
        runs[-1].numbers[0].value = 0.9 + 0.01 * seed
    markup = page(runs)
    assert "Over 3 seeds, kNN is <b>91.0 %</b> on average, from 90.0 to 92.0." in markup
    assert 'class="band run-0"' in markup and "run-1" not in markup.split("</style>")[1].split("<script>")[0]
    assert "seed0 and 2 more seeds" in markup
    other = facts()
    other["data"]["fingerprint"] = "other"
    runs.append(read_run(write_run(tmp_path / "other", config={**CONFIG, "json": None, "x": 1}, run=other)))
    assert "different data" in page(runs) and "is ahead" not in page(runs)


def test_settings_that_differ_beyond_a_screenful_open_on_demand(tmp_path):
    runs = [
        read_run(write_run(tmp_path / name, config={f"setting{n}": [name] for n in range(25)})) for name in ("a", "b")
    ]
    text = Parts(page(runs)).text
    assert "5 more" in text and text.count('["b"]') == 25


@pytest.mark.parametrize("left", ["config.yaml", "run.json", "summary.json", "csv", "checkpoints"])
def test_a_run_of_which_little_is_left_has_a_page(tmp_path, left):
    folder = tmp_path / "rest"
    write_run(folder)
    (folder / "checkpoints").mkdir()
    for entry in folder.iterdir():
        if entry.name != left:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    parts = Parts(page([read_run(folder)]))
    assert parts.open == [] and "rest" in parts.text


def test_numbers_that_never_change_are_told_without_a_chart(tmp_path):
    markup = page([read_run(write_run(tmp_path / "a", [2.0, 2.0, 2.0]))])
    assert "Constant: total loss 2." in markup and "<svg" not in markup


def test_large_pictures_become_photographs(tmp_path):
    folder = write_run(tmp_path / "a")
    noise = Image.effect_noise((400, 400), 80).convert("RGB")
    noise.save(folder / "large.png")
    (folder / "small.png").write_bytes(png())
    markup = page([read_run(folder)])
    assert markup.count("data:image/jpeg;base64,") == 1 and markup.count("data:image/png;base64,") == 1


def in_browser(text: str, folder) -> tuple[str, str]:
    """What the page becomes once its scripts have run, and what was reported to the console."""
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome on this machine")
    file = folder / "page.html"
    file.write_text(text)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --dump-dom --window-size=1200,900"
    said = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.returncode == 0, said.stderr[-2000:]
    return said.stdout, "\n".join(line for line in said.stderr.splitlines() if "CONSOLE" in line)


def test_a_browser_reads_it_and_its_script_runs(whole, tmp_path):
    """The script says that it is done, the last picture of a kind is shown and the others are not, and nothing was
    reported to the console."""
    shown, console = in_browser(page([whole]), tmp_path)
    assert 'data-ready="yes"' in shown and console == ""
    (components,) = re.findall(r'<figure class="picture" data-steps="\[10, 20, 30\]".*?</figure>', shown, re.S)
    assert ["hidden" in image for image in re.findall(r"<img [^>]*>", components)] == [True, True, False]
    assert "<output>step 30</output>" in components


def test_values_show_under_the_pointer_and_pictures_follow_their_slider(whole, tmp_path):
    acts = """<script>
      const svg = document.querySelector("svg"), frame = svg.getBoundingClientRect();
      const middle = frame.left + frame.width / 2;
      svg.dispatchEvent(new PointerEvent("pointermove", {clientX: middle, clientY: frame.top + 20}));
      const slider = document.querySelector("input[type=range]");
      slider.value = "0";
      slider.dispatchEvent(new Event("input"));
    </script></body>"""
    shown, console = in_browser(page([whole]).replace("</body>", acts), tmp_path)
    assert console == ""
    (hover,) = re.findall(r'<div class="hover" style="display: block;[^>]*>(.*?)</div></figure>', shown, re.S)
    assert re.sub(r"<[^>]*>", " ", hover).split() == ["step", "20", "2"]
    (components,) = re.findall(r'<figure class="picture" data-steps="\[10, 20, 30\]".*?</figure>', shown, re.S)
    assert ["hidden" in image for image in re.findall(r"<img [^>]*>", components)] == [False, True, True]
    assert "<output>step 10</output>" in components


def test_a_mistake_in_a_script_would_be_seen(tmp_path):
    """That the browser's console is read where the tests above look for it."""
    _, console = in_browser("<script>undefined_function();</script>", tmp_path)
    assert "undefined_function" in console


def test_a_network_that_timm_cannot_build_is_exported_in_the_other_format(whole):
    assert "--to timm" in Parts(page([whole])).text
    whole.facts["backbone"] = {"name": "resnet18", "export": "safetensors"}
    said = Parts(page([whole])).text
    assert "--to safetensors" in said and "--to timm" not in said
