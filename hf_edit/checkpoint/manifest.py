"""Which checkpoints are whole, and what they are of.

A checkpoint is made not whole before its first byte is written (`start`), and whole again by its manifest, which is
written last of `edit/` and atomically (`seal`). The Trainer then writes its trainer_state.json, and only after that
deletes older checkpoints, so at every moment the newest whole one is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from hf_edit.sync.units import named_tensors

EDIT_FOLDER = "edit"
FORMAT = 1
MARK = "EDiTCheckpointMark"  # in trainer_state.json, with the step: this checkpoint has an edit/


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds: the trained parameters with their shapes, all files with their bytes."""

    step: int
    num_replicas: int
    replica_size: int
    sync_count: int
    schedule_step: int
    units: list[str]
    config: dict[str, Any]
    parameters: dict[str, list[int]]
    files: dict[str, int]
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises OSError or ValueError where there is none that can be read."""
        values = json.loads((folder / EDIT_FOLDER / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}, the one that this version of hf_edit reads")
        if set(values) != {f.name for f in fields(cls)}:
            raise ValueError("its manifest lacks entries")
        return cls(**values)


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
    return None


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
    """From here on the checkpoint in `folder` is not whole, whatever was there before."""
    edit = folder / EDIT_FOLDER
    (edit / "manifest.json").unlink(missing_ok=True)
    (folder / "trainer_state.json").unlink(missing_ok=True)
    if edit.is_dir():
        shutil.rmtree(edit)
    edit.mkdir(parents=True)


def seal(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, with every file that is in `folder` now, after all of them have reached the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    values = {**asdict(manifest), "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}}
    target = folder / EDIT_FOLDER / "manifest.json"
    draft = target.with_suffix(".tmp")
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, target)


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
