"""The page of recipes: its torchrun recipe runs, its commands can be typed, the texts that it quotes exist."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from transformers import TrainingArguments

from hf_edit import EDiTConfig
from tests.launch.launching import ROOT, free_port, run

PAGE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
BASH = re.findall(r"(?s)```bash\n(.*?)```", PAGE)
PYTHON = re.findall(r"(?s)```python\n(.*?)```", PAGE)
# A command that starts a script: the launcher with its flags, the script, the script's flags.
COMMAND = re.compile(r"(accelerate launch|torchrun|python)\b([^\n|;&]*?) (\S+\.py)\b([^\n|;&']*)")


def block(mark: str) -> str:
    found = re.search(rf"<!-- recipe {mark} -->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    assert found, f"examples/README.md has no block after <!-- recipe {mark} -->"
    return found[1]


def small(folder: Path) -> list[str]:
    """The page's $SMALL, and a short text to read."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join(f"Document {i} says {[i * j for j in range(200)]}." for i in range(40)), "utf-8")
    assert BASH[0].startswith('SMALL="')
    return [*shlex.split(shlex.split(BASH[0].partition("=")[2].replace("\\\n", " "))[0]), "--train_file", str(corpus)]


def without_continuations(text: str) -> str:
    return re.sub(r"\\\n\s*", "", text)


# -- what can be run ---------------------------------------------------------------------------------------------------


def test_the_torchrun_recipe(tmp_path: Path) -> None:
    program, *words = shlex.split(block("torchrun"))
    assert program == "torchrun"
    command = ["-m", "torch.distributed.run", f"--master-port={free_port()}", *words, *small(tmp_path)]
    environment = {"GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    output = run([*command, "--output_dir", str(tmp_path / "out")], 600, environment)
    assert output.count("EDiT: 2 replicas x 1 shards.") == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["layout"] == "2 replicas x 1 shards"
    assert (summary["inner_steps"], summary["syncs"]) == (24, 3)
    assert "inner steps / syncs        24 / 3" in PAGE


# -- what can be typed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", BASH)
def test_bash_parses(text: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("text", PYTHON)
def test_python_parses(text: str) -> None:
    ast.parse(text)


def fields_of(script: Path) -> set[str]:
    """Fields of a script's dataclasses, and of those in common.py that they may inherit from."""
    names: set[str] = set()
    for path in (script, script.parent / "common.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names |= {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}  # type: ignore[union-attr]
    return names


def script_flags(name: str) -> set[str]:
    script = ROOT / name
    assert script.is_file(), f"the page starts {name}"
    source, names = script.read_text(encoding="utf-8"), fields_of(script)
    if "TrainingArguments" in source or "SFTConfig" in source:
        names |= {field.name for field in dataclasses.fields(TrainingArguments)}
    if re.search(r"parse\(\([^)]*\bEDiTConfig\b", source):
        names |= {field.name for field in dataclasses.fields(EDiTConfig)}
    return {f"--{name}" for name in names}


def launcher_flags(name: str) -> set[str]:
    parsers = {"accelerate launch": launch_command_parser, "torchrun": get_args_parser}
    return set(parsers[name]()._option_string_actions) if name in parsers else set()


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<!\S)--[a-zA-Z][\w-]*", text))


def test_commands_have_flags_that_exist() -> None:
    found = [command for text in BASH for command in COMMAND.findall(without_continuations(text))]
    assert len(found) >= 9
    for launcher, before, script, after in found:
        assert flags(before) <= launcher_flags(launcher), (launcher, script)
        assert flags(after) <= script_flags(script), script
    shared = flags(BASH[0].replace('"', " ")) | {flag for text in BASH for flag in flags(kept(text))}
    assert shared <= script_flags("examples/pretrain.py")


def kept(text: str) -> str:
    """What a block keeps in variables of its own, for the commands below it."""
    return " ".join(re.findall(r'^[A-Z]+="([^"]*)"$', without_continuations(text), re.MULTILINE))


def test_flags_in_the_text_exist() -> None:
    prose = re.sub(r"(?s)```.*?```", "", PAGE)
    known = launcher_flags("accelerate launch") | launcher_flags("torchrun") | script_flags("examples/pretrain.py")
    slurm = {"--time"}
    for code in re.findall(r"`([^`\n]+)`", prose):
        assert flags(code) <= known | slurm, code


def test_configurations_exist() -> None:
    for name in re.findall(r"accelerate_configs/\w+\.yaml|examples/\w+\.yaml", PAGE):
        assert (ROOT / name).is_file(), name


# -- what is quoted ----------------------------------------------------------------------------------------------------


def texts_of_the_sources() -> list[str]:
    """Every string of hf_edit, with `...` for what is filled in."""
    texts = []
    for path in (ROOT / "hf_edit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[sd]|%\.\d[fg]", "...", node.value))
    return texts


SYMPTOMS = [
    row.strip("| ").split(" | ")
    for row in PAGE[PAGE.index("\n## Symptoms") :].splitlines()
    if row.startswith("| ") and not row.startswith("| what you see")
]


def test_symptoms_have_a_cause_and_a_way_out() -> None:
    assert len(SYMPTOMS) >= 15
    assert all(len(row) == 3 and all(row) for row in SYMPTOMS)


def test_quoted_symptoms_are_said_somewhere() -> None:
    texts = texts_of_the_sources()
    quotes = [quote for row in SYMPTOMS for quote in re.findall(r"`([^`]+)`", row[0])]
    assert len(quotes) >= 15
    for quote in quotes:
        # The Trainer's logger puts "EDiT: " before what `_say_once` gets.
        candidates = [quote, quote.removeprefix("EDiT: ")]
        assert any(candidate in text for candidate in candidates for text in texts), quote


# -- how it reads ------------------------------------------------------------------------------------------------------


def test_lines_are_short_and_links_lead_somewhere() -> None:
    assert [line for line in PAGE.splitlines() if len(line) > 120 and not line.startswith("|")] == []
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in PAGE.splitlines()
        if line.startswith("#") and not line.startswith(("#!", "#SBATCH"))
    }
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        if target.startswith("#"):
            assert target[1:] in headings, target
        else:
            assert (ROOT / "examples" / target).exists(), target


def test_words_are_those_of_the_field() -> None:
    prose = re.sub(r"`[^`\n]+`", "", re.sub(r"(?s)```.*?```|<!--.*?-->", "", PAGE))
    assert re.findall(r"(?i)\b(?:settles?|hears?|heard|meets?|aside|told|turns?)\b", prose) == []
    assert len([word for word in prose.split() if re.search(r"\w", word)]) <= 1550


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
