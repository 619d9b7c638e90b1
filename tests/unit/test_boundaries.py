"""Who may import whom, and what `import hf_edit` may load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hf_edit"

# The house from the ground up: a file may import only files that stand before it in this list.
ORDER = [
    "bounds",
    "config",
    "model_ends",
    *(
        f"method.{name}"
        for name in (
            "penalty",
            "plan",
            "outer",
            "compression",
            "tuning",
            "balance",
            "schedule",
            "conductor",
            "spikes",
            "membership",
        )
    ),
    *(f"peers.{name}" for name in ("layout", "faults", "replica", "group", "matrices")),
    *(f"peers.{name}" for name in ("lighthouse", "connection", "elastic", "launch")),
    "optim.muon",
    *(
        f"sync.{name}"
        for name in (
            "units",
            "measure",
            "equality",
            "reduction",
            "fragments",
            "counts",
            "running",
            "unit_values",
            "outer_values",
            "healing",
            "lengths",
            "moments",
            "inner_lr",
        )
    ),
    "sync.unit_sync",
    *(f"sync.{name}" for name in ("tuned", "overlap", "rounds", "engine")),
    *(f"checkpoint.{name}" for name in ("storage", "manifest", "late", "tensors", "outer", "state")),
    *(f"telemetry.{name}" for name in ("logs", "journal", "wandb_run")),
    "trainer.base",
    "trainer.checks",
    "trainer.accelerate_hook",
    "trainer.world",
    "trainer.progress",
    "trainer.randomness",
    "trainer.position",
    "trainer.data",
    "trainer.spikes",
    "trainer.balance",
    "trainer.step",
    "trainer.decisions",
    "trainer.logs",
    "trainer.checkpoints",
    "trainer.elastic",
    "trainer.trainer",
    "trainer.loop_accelerator",
    "trainer.loop_checkpoints",
    "trainer.loop",
    *(f"cli.{name}" for name in ("job", "events", "simulation", "plan_page", "plan")),
    *(f"cli.{name}" for name in ("launch", "sizes", "findings", "measure", "check")),
    *(
        f"cli.{name}"
        for name in ("journal_reader", "journal_sums", "drawing", "figures", "report", "lighthouse", "main")
    ),
    "__init__",
]
# Floors that only those above may use; who stands on which.
FLOORS = ["method", "peers", "optim", "sync", "checkpoint", "telemetry", "trainer", "cli"]
# Libraries that only these files may import; a folder's name stands for all in it.
KEPT_TO: dict[str, set[str]] = {
    "accelerate": {"trainer", "cli.launch", "cli.findings"},
    "transformers": {"trainer", "cli.launch", "cli.sizes"},
    "torch.distributed.fsdp": {"sync.units", "trainer.checks"},
    "torch.nn.parallel": {"sync.units"},
    "wandb": {"telemetry"},
    "torchft": {"peers.lighthouse"},
}


# What only peers/ may call, by whatever name torch.distributed goes.
COLLECTIVE = re.compile(
    r"(all_|broadcast|barrier|reduce|gather|scatter|send|recv|isend|irecv|batch_isend|monitored_barrier|new_|split_group)"
)


def imports(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def breaches(name: str, source: str) -> list[str]:
    below = ORDER[: ORDER.index(name)]
    found = []
    for module in sorted(imports(source)):
        if module.startswith("hf_edit.") and module.removeprefix("hf_edit.") not in below:
            found.append(module)
        for library, homes in KEPT_TO.items():
            if (module + ".").startswith(library + ".") and not {name, name.partition(".")[0]} & homes:
                found.append(module)
    return found


def files() -> dict[str, Path]:
    """Every file with code in it, by its dotted name below `hf_edit`."""
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name: path for name, path in found.items() if not name.endswith(".__init__")}


def test_every_file_has_its_place() -> None:
    assert set(files()) == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_files_and_functions_are_short(name: str) -> None:
    source = files()[name].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
    }  # fmt: skip
    assert {function: lines for function, lines in lengths.items() if lines > 50} == {}


def collectives(source: str) -> list[str]:
    """Calls of torch.distributed's collectives, and imports of them."""
    found = []
    homes = ("dist", "torch.distributed", "torch.distributed.distributed_c10d")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in homes:
            found.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module in homes:
            found += [alias.name for alias in node.names]
    return [name for name in found if COLLECTIVE.match(name)]


@pytest.mark.parametrize("name", [name for name in ORDER if not name.startswith("peers.")])
def test_only_peers_talk(name: str) -> None:
    assert collectives(files()[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    ["dist.all_reduce(t)", "torch.distributed.barrier()", "from torch.distributed import broadcast_object_list as b"],
)
def test_talk_is_heard(line: str) -> None:
    assert len(collectives(line)) == 1


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_down(name: str) -> None:
    assert breaches(name, files()[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_says_what_lives_there(floor: str) -> None:
    source = (PACKAGE / floor / "__init__.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source))
    assert not imports(source)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("method.penalty", "from hf_edit.sync.unit_sync import OuterSync"),
        ("sync.unit_sync", "import torch.distributed.fsdp"),
        ("sync.engine", "from accelerate import Accelerator"),
        ("telemetry.logs", "from hf_edit.trainer.step import TrainerStep"),
    ],
)
def test_a_breach_is_seen(name: str, line: str) -> None:
    assert len(breaches(name, line)) == 1


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import hf_edit", "import hf_edit.method.penalty", "import hf_edit.method.plan, hf_edit.method.outer"]
)
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


# What the parts of EDiTMixin know of each other, beside their methods and what is the Trainer's own.
TRAINERS_OWN = {"lr_scheduler", "model_wrapped"}


def attributes(source: str) -> tuple[set[str], set[str], set[str]]:
    """Of the classes in `source`: attributes of `self` that are used, those that are assigned, and methods."""
    used, assigned, methods = set(), set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            methods.add(node.name)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            used.add(node.attr)
            if isinstance(node.ctx, ast.Store):
                assigned.add(node.attr)
    return used, assigned, methods


def shared(sources: list[str]) -> set[str]:
    found = [attributes(source) for source in sources]
    assigned = set().union(*(own for _, own, _ in found)) - set().union(*(methods for *_, methods in found))
    return {name for name in assigned - TRAINERS_OWN if sum(name in used for used, *_ in found) > 1}


def test_the_parts_of_the_trainer_share_few_attributes() -> None:
    parts = ("trainer", "step", "spikes", "data", "decisions", "logs", "progress", "checkpoints")
    found = shared([files()[f"trainer.{part}"].read_text(encoding="utf-8") for part in parts])
    assert len(found) <= 10, found


def test_a_shared_attribute_is_seen() -> None:
    one, other = "class A:\n def f(self):\n  self.x = self.y = 1", "class B:\n def g(self):\n  return self.x"
    assert shared([one, other]) == {"x"}


def test_xdists_schedulers_still_ask_where_a_test_belongs() -> None:
    """Else tests/conftest.py deals tests out in another way, unnoticed."""
    scheduler = pytest.importorskip("xdist.scheduler").LoadScopeScheduling
    assert "_split_scope" in vars(scheduler)
