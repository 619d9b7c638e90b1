"""The README's table of settings, made from EDiTConfig's fields: python tests/unit/readme_table.py"""

from __future__ import annotations

import dataclasses

from hf_edit.config import EDiTConfig

HEADING = ["| setting | default | meaning |", "|---|---|---|"]


def rows() -> list[str]:
    found = []
    for field in dataclasses.fields(EDiTConfig):
        default = "unset" if field.default is None else str(field.default)
        found.append(f"| `{field.name}` | {default} | {field.metadata['help']} |")
    return found


if __name__ == "__main__":
    print(*HEADING, *rows(), sep="\n")
