"""Which checkpoints are whole, and what they are of.

A checkpoint is made not whole before its first byte is written (`start`), and whole again by its manifest, which is
written last of `edit/` and atomically (`seal`). The Trainer then writes its trainer_state.json, and only after that
deletes older checkpoints, so at every moment the newest whole one is whole.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_edit.checkpoint.storage import needed_files, sync_all_to_disk, sync_to_disk
from hf_edit.sync.units import named_tensors

EDIT_FOLDER = "edit"
FORMAT = 3
MARK = "EDiTCheckpointMark"  # in trainer_state.json, with the step: this checkpoint has an edit/


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds: the trained parameters with their shapes, all files with their bytes.

    `parts` are the replicas whose parts are in this folder: all of them, or those of a host with a disk of its own. Of
    replicas that come and go, the one that wrote for all; as it is read, those too whose parts have come since.
    """

    step: int
    num_replicas: int
    replica_size: int
    parts: list[int]
    sync_count: int
    schedule_step: int
    units: list[str]
    config: dict[str, Any]
    parameters: dict[str, list[int]]
    files: dict[str, int]
    meeting: str = ""  # the key of the sync that it was written behind, where replicas come and go
    format: int = FORMAT

    @property
    def elastic(self) -> bool:
        """True if it is of replicas that come and go."""
        return bool(self.config.get("elastic", False))

    def part_for(self, replica: int) -> int:
        """Whose part replica number `replica` of a run takes: its own, or that of one in its place. Of replicas that
        come and go one has written for all, and some may not have been there."""
        wanted = replica % self.num_replicas
        absent = self.elastic and wanted not in self.parts
        return self.parts[replica % len(self.parts)] if absent else wanted

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises OSError or ValueError where there is none that can be read."""
        values = json.loads((folder / EDIT_FOLDER / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else None
            raise ValueError(
                f"its format is {found}, and this version of hf_edit reads {FORMAT}; go on with the version that wrote "
                "it, or start a new training from its weights"
            )
        if set(values) | {"meeting"} != {f.name for f in fields(cls)}:
            raise ValueError("its manifest lacks entries")
        manifest = cls(**values)
        if not manifest.parts or not set(manifest.parts) <= set(range(manifest.num_replicas)):
            raise ValueError(f"it has parts {manifest.parts} of {manifest.num_replicas} replicas")
        return replace(manifest, parts=sorted({*manifest.parts, *_later_parts(folder, manifest)}))


def problem(folder: Path, trainer: bool = True) -> str | None:
    """Why the checkpoint in `folder` cannot be resumed from; None if it is whole.

    A plain Trainer's checkpoint has no `edit/`; it is whole if its state can be read, which the Trainer writes last.

    Args:
        trainer: False for what `EDiT.save` wrote, which has no Trainer's state.
    """
    if not folder.is_dir():
        return "there is no such folder"
    marked = not trainer
    if trainer:
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except OSError:
            return "it has no trainer_state.json"
        except ValueError:
            return "its trainer_state.json breaks off"
        mark = state.get("stateful_callbacks", {}).get(MARK)
        marked = bool(mark) and mark["args"]["step"] == state["global_step"]
    if not has_edit_state(folder):
        # Where a deletion was cut off, all else may still be there.
        return "it has no edit/, which it was saved with" if marked else None
    try:
        manifest = Manifest.read(folder)
    except OSError:
        return "edit/ has no manifest, so it was not written to its end"
    except ValueError as error:
        return f"edit/manifest.json cannot be used: {error}"
    for name, size in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
            return f"{name} is {found}, {size} bytes were written"
    wrong = _wrong_parts(folder, manifest)
    return f"edit/manifest.json says more than there is: {'; '.join(wrong[:4])}" if wrong else None


def host_part(replica: int, shard: int) -> str:
    """Where in a checkpoint rank `shard` of `replica` keeps what it has on the host, and the step that it is of."""
    return f"{replica_part(replica)}/host-{shard}.pt"


def replica_part(replica: int) -> str:
    """Where in a checkpoint `replica` keeps what is its own alone."""
    return f"{EDIT_FOLDER}/replica-{replica}"


def _later_parts(folder: Path, manifest: Manifest) -> list[int]:
    """The replicas whose parts came after the manifest was written; one that is not whole is none."""
    if not manifest.elastic:
        return []
    there = [i for i in range(manifest.num_replicas) if (folder / replica_part(i)).is_dir()]
    return [i for i in there if i not in manifest.parts and not _wrong_in_part(folder, manifest, i)]


def _wrong_parts(folder: Path, manifest: Manifest) -> list[str]:
    """What is missing of the parts of all ranks, or not of the manifest's step, as the files themselves say."""
    wrong = _wrong_tensors(folder, f"{EDIT_FOLDER}/outer")
    return wrong + [text for replica in manifest.parts for text in _wrong_in_part(folder, manifest, replica)]


def _wrong_tensors(folder: Path, place: str) -> list[str]:
    wrong = []
    try:
        for name, size in needed_files(folder / place).items():
            path = folder / place / name
            if not path.is_file() or path.stat().st_size < size:
                wrong.append(f"{place}/{name} is {'cut off' if path.is_file() else 'missing'}")
    except OSError:
        wrong.append(f"{place}/.metadata is missing")
    except ValueError as error:
        wrong.append(str(error))
    return wrong


def _wrong_in_part(folder: Path, manifest: Manifest, replica: int) -> list[str]:
    wrong = _wrong_tensors(folder, replica_part(replica))
    for name in (host_part(replica, shard) for shard in range(manifest.replica_size)):
        try:
            step = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)["step"]
        except FileNotFoundError:
            wrong.append(f"{name} is missing")
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
            wrong.append(f"{name} cannot be read ({str(error).splitlines()[0]})")
        else:
            if step != manifest.step:
                wrong.append(f"{name} is of step {step}, not {manifest.step}")
    return wrong


def has_edit_state(folder: Path) -> bool:
    return (folder / EDIT_FOLDER).is_dir()


def checkpoints(output_dir: Path) -> list[Path]:
    """The `checkpoint-N` folders of `output_dir`, newest (largest N) first."""
    numbered = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in (output_dir.glob("checkpoint-*") if output_dir.is_dir() else ())
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdecimal()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def start(folder: Path) -> None:
    """From here on the checkpoint in `folder` is not whole, whatever was there before, even if the power fails."""
    edit = folder / EDIT_FOLDER
    (edit / "manifest.json").unlink(missing_ok=True)
    (folder / "trainer_state.json").unlink(missing_ok=True)
    if edit.is_dir():
        sync_to_disk(edit)
        sync_to_disk(folder)
        shutil.rmtree(edit)
    edit.mkdir(parents=True)


def seal(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, with every file that is in `folder` now, after all of them have reached the disk.

    Raises:
        RuntimeError: a part of a rank is missing, or of another step. There is no manifest then.
    """
    if wrong := _wrong_parts(folder, manifest):
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise RuntimeError(
            f"{folder} is not whole, and is left without a manifest: {'; '.join(wrong[:8])}{more}. All ranks must save "
            "at the same step, in a folder that all hosts see; or each host in its own, with save_on_each_node=True."
        )
    files = sync_all_to_disk(folder)
    sync_to_disk(folder.absolute().parent)
    values = {**asdict(manifest), "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}}
    target = folder / EDIT_FOLDER / "manifest.json"
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(values, indent=1), encoding="utf-8")
    sync_to_disk(draft)
    os.replace(draft, target)
    sync_to_disk(target.parent)


def check_model(manifest: Manifest, model: nn.Module, folder: Path) -> None:
    """The checkpoint's trained parameters must be the model's.

    Raises:
        ValueError: names or shapes differ.
    """
    mine = trained_parameters(model)
    saved = manifest.parameters
    differing = [
        *(f"{name} {saved[name]} is in the checkpoint only" for name in saved if name not in mine),
        *(f"{name} {mine[name]} is trained in the model only" for name in mine if name not in saved),
        *(f"{n} is {saved[n]} there, {mine[n]} here" for n in mine if n in saved and saved[n] != mine[n]),
    ]
    if differing:
        more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise ValueError(
            f"{folder} is of another model: {'; '.join(differing[:8])}{more}. Build the model that was trained, or "
            "start without resume_from_checkpoint."
        )


def differences(manifest: Manifest, config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of the method that differ, each as (saved, now); the number of replicas is the layout's."""
    now = json.loads(json.dumps(config))
    names = [name for name in now if name != "num_replicas"]
    return {name: (manifest.config.get(name), now[name]) for name in names if manifest.config.get(name) != now[name]}


def trained_parameters(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(param.shape) for name, param in named_tensors(model)[0].items() if param.requires_grad}
