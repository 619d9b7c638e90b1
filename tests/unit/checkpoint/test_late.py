"""Parts that come after a checkpoint is sealed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import hf_edit.checkpoint.late as late
from hf_edit.checkpoint import storage
from hf_edit.checkpoint.late import LatePart
from hf_edit.checkpoint.manifest import Manifest, problem, seal, start
from tests.unit.checkpoint.test_manifest import cut, manifest

MEETING = "7.5"


def fill(part: Path, step: int = 4) -> None:
    storage.write({"weight/step@all": torch.zeros(())}, part, None)
    torch.save({"step": step}, part / "host-0.pt")


def sealed(folder: Path, writer: int = 0, elastic: bool = True, meeting: str = MEETING) -> Path:
    """Of three replicas of one rank, one of which has written it."""
    start(folder)
    storage.write({"anchor/weight": torch.zeros(3, 2)}, folder / "edit" / "outer", None)
    fill(folder / "edit" / f"replica-{writer}")
    config = {"elastic": elastic, "num_replicas": 3}
    parts = dict(num_replicas=3, replica_size=1, parts=[writer], config=config)
    seal(folder, manifest(**parts, meeting=meeting))
    return folder


def written(checkpoint: Path, place: Path, replica: int = 2, step: int = 4) -> LatePart:
    part = LatePart(checkpoint, place, replica, MEETING)
    part.begin()
    fill(part.folder, step)
    return part


def test_it_comes_when_the_checkpoint_is_sealed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    part = written(folder, tmp_path / "part")
    assert not part.bring(), "nothing is there"
    start(folder)
    assert not part.bring(), "it is being written"
    sealed(folder)
    assert Manifest.read(folder).parts == [0]
    assert part.bring()
    assert Manifest.read(folder).parts == [0, 2]
    assert problem(folder, trainer=False) is None
    assert [Manifest.read(folder).part_for(replica) for replica in range(6)] == [0, 2, 2, 0, 0, 2]
    assert not part.place.exists()


def test_a_checkpoint_of_the_same_name_from_before_gets_none(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-4", meeting="3.1")
    part = written(folder, tmp_path / "part")
    assert not part.bring()
    assert part.folder.is_dir()
    assert Manifest.read(folder).parts == [0]


def test_one_that_is_saved_twice_behind_a_sync_is_waited_for(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-4")
    assert written(folder, tmp_path / "part").bring()
    again = written(folder, tmp_path / "part")
    assert not again.bring(), "its writer is about to begin anew"
    assert again.folder.is_dir()
    sealed(folder)
    assert again.bring()
    assert Manifest.read(folder).parts == [0, 2]


def test_one_that_is_deleted_meanwhile_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sealed(tmp_path / "checkpoint-4")
    part = written(folder, tmp_path / "part")
    monkeypatch.setattr(late, "sync_all_to_disk", lambda _: shutil.rmtree(folder))
    assert not part.bring()
    assert not folder.exists()


def test_what_came_too_late_is_deleted_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(late, "LAST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(late, "LOOK_SECONDS", 0.01)
    written(tmp_path / "checkpoint-4", tmp_path / "part")
    again = written(tmp_path / "checkpoint-8", tmp_path / "part", replica=1)
    assert [path.name for path in (tmp_path / "part" / "edit").iterdir()] == ["replica-1"]
    assert not again.bring_at_last()
    assert not (tmp_path / "part").exists()
    assert "checkpoint-8 was not seen whole here" in caplog.text
    assert "replica 1's part of it is not kept" in caplog.text


def test_who_ends_waits_for_one_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = written(tmp_path / "checkpoint-4", tmp_path / "part")
    monkeypatch.setattr(late.time, "sleep", lambda _: sealed(tmp_path / "checkpoint-4"))
    assert part.bring_at_last()
    assert Manifest.read(tmp_path / "checkpoint-4").parts == [0, 2]


BROKEN = {
    "of another step": lambda part: fill(part, step=3),
    "cut off": lambda part: cut(part / "host-0.pt"),
    "without its tensors": lambda part: (part / "__0_0.distcp").unlink(),
    "without its index": lambda part: (part / ".metadata").unlink(),
    "half deleted": lambda part: (part / "host-0.pt").unlink(),
}


@pytest.mark.parametrize("what", BROKEN)
def test_one_that_is_not_whole_is_passed_over(what: str, tmp_path: Path) -> None:
    """The checkpoint is whole without it."""
    folder = sealed(tmp_path / "checkpoint-4")
    assert written(folder, tmp_path / "part").bring()
    BROKEN[what](folder / "edit" / "replica-2")
    assert problem(folder, trainer=False) is None
    assert Manifest.read(folder).parts == [0]
    assert Manifest.read(folder).part_for(2) == 0


def test_where_none_comes_and_goes_a_manifest_is_the_last_word(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-4", elastic=False)
    fill(folder / "edit" / "replica-2")
    assert Manifest.read(folder).parts == [0]
