"""Named tensors to a folder and back, by torch.distributed.checkpoint (DCP); and what has to reach the disk.

DCP keeps its index in `.metadata`, a pickle. A checkpoint may come from anywhere, so here nothing of it is unpickled
but DCP's own classes, and nothing is read but tensors, which torch.load reads with weights_only.
"""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

# What torch 2.13 writes into `.metadata`, dtypes beside; tests/unit/checkpoint reads one of each dtype back.
_OF_DCP = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if name not in _OF_DCP.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which torch.distributed.checkpoint does not write")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads tensors alone. DCP's own reader would run whatever a `.metadata`, or a value that is no tensor, names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _metadata(Path(self.path))


def _metadata(place: Path) -> Metadata:
    try:
        with open(place / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds a {type(metadata).__name__}")
        others = [n for n, m in metadata.state_dict_metadata.items() if not isinstance(m, TensorStorageMetadata)]
        if others:
            raise ValueError(f"{others[0]} is no tensor")
        strange = [
            i.relative_path for i in metadata.storage_data.values() if Path(i.relative_path).name != i.relative_path
        ]
        if strange:
            raise ValueError(f"it points out of its folder, to {strange[0]}")
    except OSError:
        raise
    except Exception as error:  # broken pickles raise nearly anything
        raise ValueError(f"{place / '.metadata'} is refused: {error}. Nothing of it was unpickled or run.") from error
    return metadata


def write(tensors: dict[str, Tensor], place: Path, group: Any) -> None:
    """Writes this rank's parts of `tensors`; called by all ranks of `group` (None: there is one process)."""
    save(tensors, storage_writer=FileSystemWriter(place), process_group=group, no_dist=group is None)


def read(tensors: dict[str, Tensor], place: Path, group: Any) -> None:
    """Fills `tensors` in place. Called by all ranks of `group`, each with the names that it needs."""
    load(tensors, storage_reader=_Reader(place), process_group=group, no_dist=group is None)


def saved_tensors(place: Path) -> dict[str, TensorStorageMetadata]:
    """The tensors in `place` by name, with their sizes and dtypes.

    Raises:
        OSError: there is no index.
        ValueError: the index is not one that DCP wrote of tensors alone.
    """
    return dict(_metadata(place).state_dict_metadata)  # type: ignore[arg-type]


def needed_files(place: Path) -> dict[str, int]:
    """The files that the index of `place` points into, each with the bytes that it must have at least."""
    needed: dict[str, int] = {}
    for piece in _metadata(place).storage_data.values():
        needed[piece.relative_path] = max(needed.get(piece.relative_path, 0), piece.offset + piece.length)
    return needed


def sync_all_to_disk(folder: Path) -> list[Path]:
    """All files in `folder` and below, after they, and the folders with their names, have reached the disk."""
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    for path in (*files, *(path for path in reversed(paths) if path.is_dir()), folder):
        sync_to_disk(path)
    return files


def sync_to_disk(path: Path) -> None:
    """Returns when the file or folder has reached the disk; of a folder that means the names in it."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such thing for folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it says so
            raise
    finally:
        os.close(handle)
