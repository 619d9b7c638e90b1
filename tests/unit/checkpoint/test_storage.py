"""Tensors go to a folder and come back; nothing else comes back."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from hf_edit.checkpoint.storage import needed_files, read, saved_tensors, write

DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def test_every_dtype_that_a_tensor_can_have_comes_back(tmp_path: Path) -> None:
    tensors = {}
    for dtype in DTYPES:
        try:
            tensors[str(dtype)] = torch.zeros(3).to(dtype)
        except (RuntimeError, TypeError, NotImplementedError):
            continue  # not one that a tensor here can have
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4)}
    assert len(tensors) > 10
    usual = (*(f"int{bits}" for bits in (8, 16, 32, 64)), "uint8", "bool", "float16", "bfloat16", "float32", "float64")
    assert {f"torch.{name}" for name in usual} <= tensors.keys()
    write(tensors, tmp_path, None)
    saved = saved_tensors(tmp_path)
    assert {name: meta.properties.dtype for name, meta in saved.items()} == {n: t.dtype for n, t in tensors.items()}
    found = {"scalar": torch.zeros(()), "empty": torch.ones(0, 4), "torch.int64": torch.ones(3, dtype=torch.int64)}
    read(found, tmp_path, None)
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    assert list(needed_files(tmp_path)) == ["__0_0.distcp"]
    assert needed_files(tmp_path)["__0_0.distcp"] == (tmp_path / "__0_0.distcp").stat().st_size


INDEXES = {
    "a command": lambda trace: pickle.dumps(Call(os.system, f"touch {trace}")),
    "a builtin": lambda trace: pickle.dumps(Call(eval, f"open({str(trace)!r}, 'w')")),
    "a lazy module of torch": lambda trace: b"ctorch\n_dynamo\n.",
    "a method of an allowed class": lambda trace: b"\x80\x04\x8c\x05torch\x8c\x0cSize.__new__\x93.",
    "no metadata": lambda trace: pickle.dumps({"a": 1}),
    "nothing": lambda trace: b"",
    "a broken pickle": lambda trace: b"\x80\x04\x95",
    "a path out of it": lambda trace: OUTSIDE,
}
OUTSIDE = b""


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_of_anything_else_is_refused_and_not_run(what: str, tmp_path: Path, monkeypatch: Any) -> None:
    trace, place = tmp_path / "ran", tmp_path / "saved"
    write({"a": torch.zeros(3)}, place, None)
    whole = (place / ".metadata").read_bytes()
    monkeypatch.setitem(globals(), "OUTSIDE", whole.replace(b"\x8c\x0c__0_0.distcp", b"\x8c\x0c../etc/some1"))
    (place / ".metadata").write_bytes(INDEXES[what](trace))
    with pytest.raises(ValueError, match=r"\.metadata is refused: .* Nothing of it was unpickled or run"):
        saved_tensors(place)
    with pytest.raises(BaseException, match="refused"):  # DCP's own, from all ranks
        read({"a": torch.zeros(3)}, place, None)
    assert not trace.exists()


def test_a_value_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    """DCP would unpickle it with weights_only=False, although a tensor was asked for."""
    trace = tmp_path / "ran"
    save({"a": Call(os.system, f"touch {trace}")}, storage_writer=FileSystemWriter(tmp_path / "saved"), no_dist=True)
    with open(tmp_path / "saved" / ".metadata", "rb") as file:
        assert isinstance(pickle.load(file), Metadata), "the index itself is harmless"
    with pytest.raises(ValueError, match=r"refused: (a is no tensor|it names .*BytesStorageMetadata)"):
        saved_tensors(tmp_path / "saved")
    with pytest.raises(BaseException, match="refused"):
        read({"a": torch.zeros(3)}, tmp_path / "saved", None)
    assert not trace.exists()
