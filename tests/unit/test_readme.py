"""The README's figures are those of the kept results, its settings those of EDiTConfig, its links lead somewhere."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from tests.unit.readme_table import HEADING, rows

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"
PAGES = ("README.md", "CONTRIBUTING.md", "accelerate_configs/README.md", "examples/benchmarks/README.md")
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = 1400  # of the README without its table of settings
# Words that only those who built this would understand.
HOUSE_WORDS = r"settles?|hears?|heard|meets?|aside|told|turns?"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/benchmarks/report.py"""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import report

    return report


# -- the README -------------------------------------------------------------------------------------------------------


def test_it_lists_every_setting_with_its_default_and_help() -> None:
    assert "\n".join([*HEADING, *rows()]) + "\n\n" in README


def test_it_is_short() -> None:
    text = README.replace("\n".join([*HEADING, *rows()]), "")
    words = [word for word in re.sub(r"<[^>]+>", "", text).split() if re.search(r"\w", word)]
    assert len(words) <= WORDS


def code_files() -> set[str]:
    """The files of the package that the README's last block names, as paths below hf_edit."""
    block = README[README.index("```text\nhf_edit/\n") :].split("```")[1]
    found, folder = set(), ""
    for name, indent in ((line.split()[0], len(line) - len(line.lstrip())) for line in block.splitlines()[2:] if line):
        if name.endswith("/"):
            folder = name
        else:
            found.add(folder * (indent > 2) + name)
    return found


def test_it_names_every_file_of_the_package_and_no_other() -> None:
    package = ROOT / "hf_edit"
    there = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert there - code_files() == set(), "files that the README's tree leaves out"
    assert code_files() - there == set(), "files that are in the README's tree alone"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for target in ("".join(groups) for groups in targets):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_words_are_those_of_the_field(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"`[^`\n]+`", "", re.sub(r"(?s)```.*?```|<!--.*?-->", "", text))
    assert re.findall(rf"(?i)\b(?:{HOUSE_WORDS})\b", prose) == []


# -- figures ----------------------------------------------------------------------------------------------------------


def test_tables_are_made_from_the_results(report: ModuleType) -> None:
    shown = []
    for page in report.PAGES:
        text = page.read_text(encoding="utf-8")
        assert report.filled(text) == text, f"{page}: run examples/benchmarks/report.py"
        shown += [found["name"] for found in report.TABLE.finditer(text)]
    made = {"overview", *report.plan.PAGE, *(path.stem for path in report.RESULTS.glob("*.jsonl"))}
    assert {name.split()[0] for name in shown} == made


def test_a_table_that_differs_is_seen(report: ModuleType) -> None:
    text = "before\n<!-- table traffic -->\n| 78 | 4 |\n<!-- end -->\nafter"
    filled = report.filled(text)
    assert "| 78 | 4 |" not in filled
    assert re.search(r"before\n.*\n\| 20 inner steps \| \d+ bytes \| \d+ bytes \|\n.*after", filled, re.DOTALL)
    with pytest.raises(SystemExit, match="no table 'traffics'"):
        report.filled("<!-- table traffics -->\n\n<!-- end -->")


def test_it_says_how_well_plan_foresees(report: ModuleType) -> None:
    hits, _, rest = report.table("plan_summary").partition(" cells ")
    assert rest.startswith("are within 0.05")
    assert f"`plan` is within 0.05 of {hits} measured shares" in README


@pytest.mark.parametrize("kind", ["light", "dark"])
def test_the_figure_shows_the_results(kind: str, report: ModuleType) -> None:
    path = report.FIGURES / f"overview-{kind}.svg"
    assert path.stat().st_size < 100_000
    description = ElementTree.parse(path).find(".//{http://purl.org/dc/elements/1.1/}description")
    assert description is not None
    assert json.loads(description.text or "") == report.overview.plotted(report.read)


def test_results_are_a_line_a_run(report: ModuleType) -> None:
    files = sorted(report.RESULTS.iterdir())
    assert {path.suffix for path in files} == {".jsonl"}
    lines = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert 100 < len(lines) < 560
    assert sum(path.stat().st_size for path in files) < 500_000
    for path in files:
        results = report.read_results(path)
        assert results["invocations"], path
        assert all(made.get("command") and made.get("commit") for made in results["invocations"]), path
        numbers = [run.get("made", {}).get("invocation", 0) for run in results["runs"]]
        assert set(numbers) <= set(range(len(results["invocations"]))), path


def test_results_come_back_as_they_were_kept(report: ModuleType, tmp_path: Path) -> None:
    from lib.results import add_run, open_results, read_results

    path = tmp_path / "some.jsonl"
    results = open_results(path, {"tau": 8})
    add_run(results, {"method": "edit", "seconds": [1 / 3, 2]}, path)
    again = open_results(path, {"tau": 8})
    add_run(again, {"method": "diloco", "loss": None}, path)
    kept = read_results(path)
    assert [run["method"] for run in kept["runs"]] == ["edit", "diloco"]
    assert kept["runs"][0]["seconds"] == [0.3333333, 2]
    assert [run["made"]["invocation"] for run in kept["runs"]] == [0, 1]
    with pytest.raises(SystemExit, match="Give --json another name"):
        open_results(path, {"tau": 16})
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="no file of results"):
        read_results(path)
