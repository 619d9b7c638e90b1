"""The README's figures are those of the kept results, its settings those of EDiTConfig, its links lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from tests.unit.readme_table import rows

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_lists_every_setting_with_its_default_and_help() -> None:
    lines = README.splitlines()
    assert [row for row in rows() if row not in lines] == []


def test_the_traffic_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "examples/benchmarks/results/traffic.json").read_text(encoding="utf-8"))
    for label, figures in (
        ("20 inner steps", measured["bytes_of_20_inner_steps"]),
        ("one sync", measured["bytes_of_one_sync"]),
    ):
        assert f"| {label} | {figures[0]:,} bytes | {figures[1]:,} bytes |" in README
    assert f"{measured['parameter_bytes']:,} bytes of fp32 parameters" in README


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("slow_network", "tables"),
        ("slow_network_short_steps", "tables"),
        ("slow_network_tau32", "tables"),
        ("slow_network_tau128", "tables"),
        ("stragglers", "table"),
        ("stragglers_10s", "table"),
        ("peers", "table"),
        ("convergence", "tables"),
        ("convergence_100mbit", "tables"),
        ("convergence_batch32", "tables"),
        ("convergence_2x2", "tables"),
    ],
)
def test_its_tables_are_made_from_the_results(name: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row between <!-- NAME --> and the next blank line is one that the benchmark makes from its JSON."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples/benchmarks"), *sys.path])
    results = json.loads((ROOT / f"examples/benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    script = re.sub(r"_(short_steps|tau32|tau128|10s|100mbit|batch32|2x2)$", "", name)
    module = importlib.import_module({"convergence": "convergence_report"}.get(script, script))
    made = getattr(module, function)(results).splitlines()
    told = [block.splitlines() for block in re.findall(rf"<!-- {name} -->\n(.*?)\n\n", README, re.DOTALL)]
    assert told, f"README.md shows no table of {name}"
    for block in told:
        assert len(block) > 2
        assert [line for line in block if line not in made] == []


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 8
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target
