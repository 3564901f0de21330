import sys

from ssd.cli import main
from tests.benchmarks import on_gpu


def test_what_is_measured_is_asked_for_in_words_that_the_command_knows(tmp_path, capsys):
    """Options before --help are read before it is answered."""
    commands = [command for command, _ in on_gpu.stages(tmp_path, None, None).values()]
    ours = [command[len(on_gpu.SSD) :] for command in commands if tuple(command[: len(on_gpu.SSD)]) == on_gpu.SSD]
    assert len(ours) == 5
    for words in ours:
        assert main([*words, "--help"]) == 0, capsys.readouterr().err


def test_what_is_done_is_kept_and_what_fails_or_takes_too_long_is_said(tmp_path, monkeypatch, capsys):
    def python(line: str) -> list[str]:
        return [sys.executable, "-c", line]

    made = {
        "good": (python("print('a table')"), 1.0),
        "bad": (python("raise SystemExit(3)"), 1.0),
        "slow": (python("print('begun'); import time; time.sleep(60)"), 1 / 60),
    }
    monkeypatch.setattr(on_gpu, "stages", lambda out, train, test: made)
    assert on_gpu.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "a table" in said and "bad: failed with status 3" in said and "slow: cut off after 1 s" in said
    assert (tmp_path / "slow.unfinished.txt").read_text() == "begun\n", "what it had said is kept"

    made["good"] = (python("raise SystemExit(1)"), 1.0)
    assert on_gpu.main(["--out", str(tmp_path), "--stages", "good"]) == 0, "it is not run again"
    assert on_gpu.main(["--out", str(tmp_path), "--minutes", "0", "--stages", "bad"]) == 1
    assert "bad: left for another call" in capsys.readouterr().out
