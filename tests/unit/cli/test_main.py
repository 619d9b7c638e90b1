"""The command line as a whole."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from hf_edit.cli.main import COMMANDS, main

COMMAND = [sys.executable, "-m", "hf_edit.cli.main"]


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)])
def test_help_fits_a_screen(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert words or all(any(name in line for line in lines) for name in COMMANDS)


def test_an_unknown_command_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plane"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "invalid choice: 'plane'" in error
    assert all(name in error for name in COMMANDS)


def test_who_reads_may_stop() -> None:
    words = ["plan", "--parameters", "1b", "--replicas", "2", "--step-seconds", "1", "--rate", "1gbit"]
    plan = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert plan.stdout is not None
    plan.stdout.close()
    _, error = plan.communicate(timeout=120)
    assert error == b""
    assert plan.returncode == 0


def test_it_is_installed_as_hf_edit() -> None:
    (command,) = entry_points(group="console_scripts", name="hf-edit")
    assert command.load() is main


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["plan", "--steps-second", "1"],
            "hf-edit plan: error: unknown: --steps-second 1; did you mean --step-seconds?",
        ),
        (["check", "--modell", "x"], "hf-edit check: error: unknown: --modell x; did you mean --model?"),
        (["plan", "--replicas", "2.5"], "'2.5': give a whole number of at least 1"),
    ],
)
def test_a_wrong_word_is_answered_by_its_command(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())


def test_words_of_a_flag_may_be_joined_in_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["--parameters", "1b", "--replicas", "2", "--step_seconds=1", "--rate", "1gbit", "--json"]
    assert main(["plan", *numbers]) == 0
    assert '"step_seconds": 1.0' in capsys.readouterr().out
    assert main(["check", "--config-file", "accelerate_configs/cpu_4x1.yaml"]) == 0
