"""Which checkpoints are whole, and what is said of the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from hf_edit.checkpoint.manifest import MARK, Manifest, check_model, checkpoints, differences, problem, seal, start


def manifest(**changes: object) -> Manifest:
    values = dict(
        step=4, num_replicas=2, replica_size=2, sync_count=1, schedule_step=4, units=["root"],
        config={"sync_interval": 4, "num_replicas": 2}, parameters={"weight": [3, 2], "bias": [3]}, files={},
    )  # fmt: skip
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


def write(folder: Path) -> Path:
    """A whole checkpoint."""
    start(folder)
    (folder / "edit" / "outer").mkdir()
    (folder / "edit" / "outer" / "__0_0.distcp").write_bytes(b"12345")
    (folder / "model.safetensors").write_bytes(b"123")
    seal(folder, manifest())
    state = {"global_step": 4, "stateful_callbacks": {MARK: {"args": {"step": 4}}}}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


def test_a_whole_one_is_whole(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-4")
    assert problem(folder) is None
    assert Manifest.read(folder).files == {"edit/outer/__0_0.distcp": 5, "model.safetensors": 3}
    assert not list(folder.rglob("*.tmp"))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest missing": (lambda f: (f / "edit/manifest.json").unlink(), "edit/ has no manifest"),
    "manifest cut off": (lambda f: cut(f / "edit/manifest.json"), "edit/manifest.json cannot be used"),
    "another format": (lambda f: edited(f, format=99), "its format is 99, and this"),
    "entries missing": (lambda f: edited(f, step=None), "its manifest lacks entries"),
    "file missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing, 3 bytes were"),
    "file cut off": (lambda f: cut(f / "edit/outer/__0_0.distcp"), "__0_0.distcp is 4 bytes, 5 bytes were written"),
    "state missing": (lambda f: (f / "trainer_state.json").unlink(), "it has no trainer_state.json"),
    "state cut off": (lambda f: cut(f / "trainer_state.json"), "its trainer_state.json breaks off"),
    "deletion cut off": (lambda f: shutil.rmtree(f / "edit"), "it has no edit/, which it was saved with"),
    "begun again": (start, "it has no trainer_state.json"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edited(folder: Path, **changes: object) -> None:
    path = folder / "edit" / "manifest.json"
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_not_whole_is_told(how: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-4")
    spoil, text = SPOILED[how]
    spoil(folder)
    assert text in str(problem(folder))


def test_a_plain_trainers_checkpoint_is_whole_with_its_state(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}", encoding="utf-8")
    assert problem(tmp_path) is None
    assert problem(tmp_path, trainer=False) == "it has no edit/, which it was saved with"
    # Continued from a run of several replicas, its state still has that run's mark, of an earlier step.
    state = {"global_step": 8, "stateful_callbacks": {MARK: {"args": {"step": 4}}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    assert problem(tmp_path) is None
    assert problem(tmp_path / "nowhere") == "there is no such folder"


def test_the_newest_is_the_one_of_the_most_steps(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-best", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-500").write_text("a file", encoding="utf-8")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]
    assert checkpoints(tmp_path / "nowhere") == []


def test_another_model_is_told_by_its_names(tmp_path: Path) -> None:
    check_model(manifest(), nn.Linear(2, 3), tmp_path)
    with pytest.raises(ValueError, match=r"weight is \[3, 2\] there, \[3, 4\] here"):
        check_model(manifest(), nn.Linear(4, 3), tmp_path)
    with pytest.raises(ValueError, match=r"bias \[3\] is in the checkpoint only"):
        check_model(manifest(), nn.Linear(2, 3, bias=False), tmp_path)
    with pytest.raises(ValueError, match=r"bias \[3\] is trained in the model only"):
        check_model(manifest(parameters={"weight": [3, 2]}), nn.Linear(2, 3), tmp_path)


def test_differences_are_the_methods() -> None:
    assert differences(manifest(), {"sync_interval": 8, "num_replicas": 4}) == {"sync_interval": (4, 8)}
