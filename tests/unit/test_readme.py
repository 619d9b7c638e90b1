"""The README's figures are those of the kept results, its settings those of EDiTConfig, its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

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


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 8
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target
