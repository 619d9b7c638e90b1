"""Which checkpoints are whole, and what is said of the others."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_edit.checkpoint import storage
from hf_edit.checkpoint.manifest import MARK, Manifest, check_model, checkpoints, differences, problem, seal, start


def manifest(**changes: object) -> Manifest:
    values = dict(
        step=4, num_replicas=2, replica_size=2, parts=[0, 1], sync_count=1, schedule_step=4, units=["root"],
        config={"sync_interval": 4, "num_replicas": 2}, parameters={"weight": [3, 2], "bias": [3]}, files={},
    )  # fmt: skip
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


def write(folder: Path, parts: Iterable[int] = (0, 1), steps: Mapping[str, int] = {}) -> Path:
    """A whole checkpoint, unless a part's `steps` say otherwise."""
    start(folder)
    place = folder / "edit"
    storage.write({"anchor/weight": torch.zeros(3, 2)}, place / "outer", None)
    for replica in parts:
        storage.write({"weight/step@all": torch.zeros(())}, place / f"replica-{replica}", None)
        for shard in range(2):
            name = f"replica-{replica}/host-{shard}.pt"
            torch.save({"step": steps.get(name, 4)}, place / name)
    (folder / "model.safetensors").write_bytes(b"123")
    seal(folder, manifest(parts=list(parts)))
    state = {"global_step": 4, "stateful_callbacks": {MARK: {"args": {"step": 4}}}}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


def test_a_whole_one_is_whole(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-4")
    assert problem(folder) is None
    files = Manifest.read(folder).files
    assert files["model.safetensors"] == 3
    of_a_replica = [".metadata", "__0_0.distcp", "host-0.pt", "host-1.pt"]
    assert [name for name in files if "replica-1" in name] == [f"edit/replica-1/{name}" for name in of_a_replica]
    assert not list(folder.rglob("*.tmp"))


def test_a_host_with_a_disk_of_its_own_has_its_own_replicas_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-4", parts=[1])
    assert problem(folder) is None
    edited(folder, parts=[0, 1])
    assert "edit/replica-0/.metadata is missing" in str(problem(folder))


MISSING: dict[str, tuple[Callable[[Path], object], str]] = {
    "replica": (lambda edit: shutil.rmtree(edit / "replica-1"), "edit/replica-1/.metadata is missing"),
    "rank": (lambda edit: (edit / "replica-1/host-1.pt").unlink(), "edit/replica-1/host-1.pt is missing"),
    "rank's tensors": (lambda edit: (edit / "replica-0/__0_0.distcp").unlink(), "replica-0/__0_0.distcp is missing"),
    "end of tensors": (lambda edit: cut(edit / "outer/__0_0.distcp"), "edit/outer/__0_0.distcp is cut off"),
    "outer state": (lambda edit: shutil.rmtree(edit / "outer"), "edit/outer/.metadata is missing"),
    "end of a rank's values": (lambda edit: cut(edit / "replica-0/host-0.pt"), "host-0.pt cannot be read"),
    "index": (lambda edit: cut(edit / "outer/.metadata"), ".metadata is refused"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_lacks_a_part_is_not_sealed(what: str, tmp_path: Path) -> None:
    """Nor is a manifest that says more than there is believed."""
    folder = write(tmp_path / "checkpoint-4")
    spoil, text = MISSING[what]
    sealed = Manifest.read(folder)
    (folder / "edit" / "manifest.json").unlink()
    spoil(folder / "edit")
    with pytest.raises(RuntimeError, match=re.escape(text)):
        seal(folder, sealed)
    assert problem(folder) == "edit/ has no manifest, so it was not written to its end"
    kept = {name: (folder / name).stat().st_size for name in sealed.files if (folder / name).is_file()}
    values = {**asdict(sealed), "files": kept}
    (folder / "edit" / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    assert text in str(problem(folder))


def test_parts_of_different_steps_are_not_sealed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"edit/replica-1/host-0\.pt is of step 5, not 4\. All ranks must save"):
        write(tmp_path / "checkpoint-4", steps={"replica-1/host-0.pt": 5})


def test_files_and_the_folders_above_them_reach_the_disk_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, then their folders, up to the parent; then the manifest, and its folder after it has its name."""
    synced: list[str] = []
    sync_to_disk = storage.sync_to_disk

    def recorded(path: Path) -> None:
        sync_to_disk(path)
        synced.append(path.relative_to(tmp_path).as_posix())
        named.append((tmp_path / "checkpoint-4/edit/manifest.json").exists())

    named: list[bool] = []
    monkeypatch.setattr("hf_edit.checkpoint.manifest.sync_to_disk", recorded)
    monkeypatch.setattr("hf_edit.checkpoint.storage.sync_to_disk", recorded)
    folder = write(tmp_path / "checkpoint-4")
    files = [f"checkpoint-4/{name}" for name in Manifest.read(folder).files]
    assert synced[: len(files)] == files
    folders = ["edit/replica-1", "edit/replica-0", "edit/outer", "edit"]
    assert synced[len(files) : -2] == [*(f"checkpoint-4/{name}" for name in folders), "checkpoint-4", "."]
    assert synced[-2:] == ["checkpoint-4/edit/manifest.tmp", "checkpoint-4/edit"]
    assert named == [False] * (len(named) - 1) + [True]
    synced.clear()
    start(folder)
    assert synced == ["checkpoint-4/edit", "checkpoint-4"], "it is not whole before its first byte is written"


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest missing": (lambda f: (f / "edit/manifest.json").unlink(), "edit/ has no manifest"),
    "manifest cut off": (lambda f: cut(f / "edit/manifest.json"), "edit/manifest.json cannot be used"),
    "another format": (lambda f: edited(f, format=99), "its format is 99, and this"),
    "entries missing": (lambda f: edited(f, step=None), "its manifest lacks entries"),
    "file missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing, 3 bytes were"),
    "file cut off": (lambda f: cut(f / "model.safetensors"), "model.safetensors is 2 bytes, 3 bytes were written"),
    "parts of others": (lambda f: edited(f, parts=[0, 2]), "it has parts [0, 2] of 2 replicas"),
    "no parts": (lambda f: edited(f, parts=[]), "it has parts [] of 2 replicas"),
    "the format before": (lambda f: edited(f, format=1), "go on with the version that wrote it, or start a new"),
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
