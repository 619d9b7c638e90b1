"""Who may import whom, and what `import hf_edit` may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hf_edit"

# Each file and those of the package that it may import: down the list only.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "penalty": set(),
    "outer": set(),
    "schedule": set(),
    "layout": set(),
    "groups": {"layout"},
    "units": set(),
    "measure": set(),
    "plan": {"config", "penalty"},
    "records": {"penalty", "plan"},
    "background": {"groups", "penalty", "plan"},
    "sync": {"background", "config", "penalty", "plan", "outer", "groups", "measure", "records", "units"},
    "manifest": {"units"},
    "checkpoint": {"layout", "manifest", "penalty", "sync", "units"},
    "equality": {"config", "groups", "units"},
    "engine": {
        "background",
        "checkpoint",
        "config",
        "equality",
        "groups",
        "manifest",
        "records",
        "schedule",
        "sync",
        "units",
    },
    "accelerate_hook": {"config", "layout"},
    "telemetry": {"penalty", "records"},
    "loop": {"accelerate_hook", "checkpoint", "config", "engine", "groups", "layout", "manifest", "telemetry", "units"},
    "trainer_checkpoints": {"accelerate_hook", "checkpoint", "config", "engine", "layout", "manifest", "units"},
    "trainer_counts": {"accelerate_hook", "engine", "groups", "layout", "records", "telemetry"},
    "trainer_progress": {"checkpoint", "config", "engine", "layout", "manifest", "schedule"},
    "trainer_decisions": {"config", "engine", "telemetry", "trainer_progress"},
    "trainer": {
        "accelerate_hook",
        "config",
        "engine",
        "groups",
        "layout",
        "telemetry",
        "trainer_checkpoints",
        "trainer_counts",
        "trainer_decisions",
        "trainer_progress",
        "units",
    },
    "__init__": {"config", "loop", "telemetry", "trainer"},
}
# Libraries that only these files may import.
KEPT_TO: dict[str, set[str]] = {
    "accelerate": {"accelerate_hook", "loop", "trainer"},
    "transformers": {"trainer", "trainer_checkpoints", "trainer_counts", "trainer_decisions", "trainer_progress"},
    "torch.distributed.fsdp": {"units", "accelerate_hook"},
    "torch.nn.parallel": {"units"},
    "wandb": {"telemetry"},
}


def imports(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def breaches(name: str, source: str) -> list[str]:
    found = []
    for module in sorted(imports(source)):
        if module.startswith("hf_edit.") and module.removeprefix("hf_edit.") not in ALLOWED[name]:
            found.append(module)
        for library, homes in KEPT_TO.items():
            if (module + ".").startswith(library + ".") and name not in homes:
                found.append(module)
    return found


def test_every_file_is_listed() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ALLOWED)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_imports_point_down(name: str) -> None:
    assert breaches(name, (PACKAGE / f"{name}.py").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("penalty", "from hf_edit.sync import OuterSync"),
        ("sync", "import torch.distributed.fsdp"),
        ("engine", "from accelerate import Accelerator"),
    ],
)
def test_a_breach_is_seen(name: str, line: str) -> None:
    assert len(breaches(name, line)) == 1


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import hf_edit", "import hf_edit.penalty", "import hf_edit.outer"])
def test_the_trainer_is_loaded_on_first_use(statement: str) -> None:
    assert not {"transformers", "accelerate", "wandb", "datasets"} & loaded_by(statement)


def test_import_hf_edit_adds_nothing_to_import_torch() -> None:
    assert loaded_by("import torch, hf_edit") - loaded_by("import torch") == {"hf_edit"}


def test_public_names() -> None:
    import hf_edit

    assert {"EDiTConfig", "EDiTTrainer", "EDiTMixin"} <= set(hf_edit.__all__) <= set(dir(hf_edit))
    for name in hf_edit.__all__:
        assert getattr(hf_edit, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        hf_edit.Trainer  # noqa: B018
