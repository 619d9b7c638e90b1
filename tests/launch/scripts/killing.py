"""Kills a training run at random moments of its saves, and resumes it, again and again.

Arguments: folder, seed, number of kills. Two ranks (two replicas) are forked for each life of the run, which saves
after every step; both are killed outright. After every kill each checkpoint that counts as whole must be whole: its
weights are its anchor's, bit for bit, and both replicas' inner states are there. The next life must resume from the
newest.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_edit import EDiTConfig, EDiTTrainer
from hf_edit.checkpoint.manifest import checkpoints, problem
from tests.launch.launching import free_port

WORLD = 2


class Started(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 0:
            (Path(args.output_dir) / "started.json").write_text(json.dumps(state.global_step), encoding="utf-8")


def live(rank: int, port: int, folder: Path) -> None:
    """One rank of one life of the run: trains until it is killed."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    args = TrainingArguments(
        output_dir=str(folder), max_steps=100_000, save_steps=1, save_total_limit=1, per_device_train_batch_size=1,
        report_to="none", disable_tqdm=True, logging_steps=100_000,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 64
    trainer = EDiTTrainer(
        model=model, args=args, train_dataset=rows, callbacks=[Started()],
        edit_config=EDiTConfig(sync_interval=1, num_replicas=WORLD),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=any(problem(path) is None for path in checkpoints(folder)))


def check_whole(folder: Path) -> None:
    """Reads everything in it."""
    weights = load_file(folder / "model.safetensors")
    outer = read(folder / "edit" / "outer")
    anchors = {key.removeprefix("anchor/"): value for key, value in outer.items() if key.startswith("anchor/")}
    assert set(weights) == set(anchors), set(weights) ^ set(anchors)
    assert all(torch.equal(weights[name], anchors[name]) for name in weights), f"{folder}: weights of another step"
    for replica in range(WORLD):
        inner = read(folder / "edit" / f"replica-{replica}")
        assert {key.rpartition("/")[0] for key in inner} == set(weights)
        torch.load(folder / "edit" / f"replica-{replica}" / "host-0.pt", weights_only=True)
    steps = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    assert folder.name == f"checkpoint-{steps}"


def read(place: Path) -> dict[str, torch.Tensor]:
    saved = FileSystemReader(place).read_metadata().state_dict_metadata
    tensors = {key: torch.empty(meta.size, dtype=meta.properties.dtype) for key, meta in saved.items()}
    load(tensors, storage_reader=FileSystemReader(place), no_dist=True)
    return tensors


def one_life(folder: Path, wait: float) -> None:
    """Forks the ranks, and kills them `wait` seconds after training has begun and the first new step was saved."""
    (folder / "started.json").unlink(missing_ok=True)
    port, ranks = free_port(), []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            try:
                live(rank, port, folder)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        ranks.append(pid)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "started.json").exists():
            assert time.monotonic() < deadline, "training did not begin"
            assert all(os.waitpid(pid, os.WNOHANG)[0] == 0 for pid in ranks), "a rank has failed"
            time.sleep(0.005)
        time.sleep(wait)
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
    for pid in ranks:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"a rank ended by itself, with {status}"


def main() -> None:
    folder, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    chance = random.Random(seed)
    cut_off, newest = 0, None
    for number in range(kills):
        one_life(folder, wait=chance.uniform(0.05, 1.0))
        started = json.loads((folder / "started.json").read_text(encoding="utf-8"))
        assert started == (int(newest.name.split("-")[1]) if newest else 0), (started, newest)
        found = checkpoints(folder)
        whole = [path for path in found if problem(path) is None]
        cut_off += len(found) - len(whole)
        for path in whole:
            check_whole(path)
        assert whole or not newest, "a whole checkpoint was there, and none is left"
        newest = whole[0] if whole else None
        reasons = {path.name: problem(path) for path in found if path not in whole}
        print(f"kill {number}: whole {[path.name for path in whole]}, not whole {reasons}", flush=True)
    assert cut_off, "no kill fell into a save"
    print(f"passed: {kills} kills, {cut_off} cut-off checkpoints", flush=True)


if __name__ == "__main__":
    main()
