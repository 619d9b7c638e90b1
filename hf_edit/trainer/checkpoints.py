"""The Trainer's checkpoints with several replicas: what the Trainer writes and reads, plus `edit/`.

Also with one replica, where a checkpoint has `edit/`: runs may grow from one replica to several and shrink back.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

import hf_edit.checkpoint.state as checkpoint
from hf_edit.checkpoint.manifest import (
    MARK,
    Manifest,
    check_model,
    checkpoints,
    differences,
    has_edit_state,
    problem,
    seal,
    start,
)
from hf_edit.checkpoint.storage import sync_to_disk
from hf_edit.config import EDiTConfig
from hf_edit.peers.layout import Layout
from hf_edit.sync.engine import Engine
from hf_edit.sync.units import reshard
from hf_edit.trainer.accelerate_hook import full_state_dict, save_sharded, saves_sharded
from hf_edit.trainer.base import TrainerToBe


class EDiTCheckpointMark(TrainerCallback, ExportableState):
    """Says in trainer_state.json that this step's checkpoint has an `edit/`: without it, it is not whole."""

    def __init__(self, step: int = -1) -> None:
        self.step = step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.stateful_callbacks.setdefault(MARK, {})  # the state of a plain Trainer's checkpoint has no place for it

    def state(self) -> dict[str, Any]:
        return {"args": {"step": self.step}, "attributes": {}}


class TrainerCheckpoints(TrainerToBe):
    """The part of `EDiTMixin` that saves and resumes; peers, counts and equal replicas are the mixin's own."""

    edit_config: EDiTConfig
    edit_layout: Layout
    _engine: Engine | None
    _resumed: tuple[Path, Manifest] | None = None
    _resumed_host: dict[str, Any]

    # -- which one ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. A checkpoint that is not whole is never resumed from.

        Raises:
            ValueError: the checkpoint that was named is not whole, or is of another model, or ranks name different
            ones; each host saves on its own disk, and a replica lies on several.
        """
        self._resumed = None
        self._check_hosts()
        if self.edit_layout.num_replicas > 1:
            self._check_that_all_resume(resume_from_checkpoint)
        if resume_from_checkpoint:
            resume_from_checkpoint = self._choose_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_that_all_resume(self, asked: Any) -> None:
        name = Path(asked).name if isinstance(asked, str | os.PathLike) else bool(asked)  # a host may have its own disk
        names = self._of_all_ranks(name)
        if len(set(names)) > 1:
            raise ValueError(
                f"resume_from_checkpoint differs between the ranks, which are 0 to {len(names) - 1}: {names}. Give all "
                "the same: True on all of them takes the newest checkpoint that is whole on all."
            )

    def _check_hosts(self) -> None:
        here, size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), self.edit_layout.replica_size
        if self.args.save_on_each_node and self.edit_layout.num_replicas > 1 and here % size:
            raise ValueError(
                f"save_on_each_node=True with replicas of {size} ranks, {here} on a host: a replica's part would lie "
                "on the disks of several hosts, where none can read it. Set save_on_each_node=False with an "
                "output_dir that all hosts share, or num_replicas so that each replica lies on one host."
            )

    def _choose_checkpoint(self, asked: Any) -> Any:
        named = None if asked is True else Path(asked)
        found = checkpoints(Path(self.args.output_dir) if named is None else named.absolute().parent)
        candidates = found[:1] if named is None else [named]
        if self.edit_layout.num_replicas == 1 and not any(map(has_edit_state, candidates)):
            return asked  # a plain Trainer's affair
        problems = self._problems_on_all_ranks(named, found)
        whole = next((path for path, trouble in problems.items() if trouble is None), None)
        if named is not None and problems[named] is not None:
            instead = f"The newest whole one is {whole}" if whole else "There is no whole one beside it"
            raise ValueError(f"Cannot resume from {named}: {problems[named]}. {instead}.")
        if whole is None:
            reasons = "; ".join(f"{path.name}: {trouble}" for path, trouble in [*problems.items()][:4])
            why = f": {reasons}" if reasons else ""
            raise ValueError(f"No valid checkpoint found in output directory ({self.args.output_dir}){why}")
        for path, trouble in problems.items():
            if trouble is not None:
                self._say_once(f"{path} is passed over ({trouble}); resuming from {whole}.")
        if has_edit_state(whole) and self.model is not None:
            check_model(Manifest.read(whole), self.model, whole)
        return str(whole)

    def _problems_on_all_ranks(self, named: Path | None, found: list[Path]) -> dict[Path, str | None]:
        """What keeps a checkpoint from being resumed on any rank: of `named`, and then from the newest to the oldest,
        up to the first that can be resumed. The ranks may see different disks.
        """
        if dist.is_initialized():
            self._get_peers().barrier()  # rank 0 may still be at the end of what a training of this process has saved
        others = {Path(path) for theirs in self._of_all_ranks([str(path) for path in found]) for path in theirs}
        newest_first = sorted(others - {named}, key=lambda path: int(path.name.split("-")[1]), reverse=True)
        merged: dict[Path, str | None] = {}
        for path in [*([] if named is None else [named]), *newest_first]:
            troubles = self._of_all_ranks(problem(path))
            rank, trouble = next(((rank, text) for rank, text in enumerate(troubles) if text), (0, None))
            merged[path] = trouble if len(set(troubles)) == 1 else f"on rank {rank}: {trouble}"
            if trouble is None:
                break
        return merged

    def _of_all_ranks(self, value: Any) -> list[Any]:
        return self._get_peers().gather_object(value) if dist.is_initialized() else [value]

    # -- in -----------------------------------------------------------------------------------------------------------

    def _training(self) -> checkpoint.Training:
        """What a checkpoint is of."""
        group = dist.group.WORLD if dist.is_initialized() else None
        if self.edit_layout.num_replicas > 1:
            group = self._get_peers().inside.group
        return checkpoint.Training(
            self.edit_layout, self.model_wrapped, self.optimizer, group, self._engine, self.edit_config.elastic
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Private in transformers 5.23, as are the underscored methods below; tests/launch resumes bit for bit.
        folder = Path(resume_from_checkpoint)
        if not has_edit_state(folder):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        check_model(Manifest.read(folder), model, folder)
        checkpoint.load_model(folder, model, self._training().group)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not has_edit_state(Path(checkpoint)):
            if checkpoint is not None and self.edit_layout.num_replicas > 1:
                self._say_once(f"{checkpoint} has no edit/: the outer state starts anew from its parameters.")
            return super()._load_optimizer_and_scheduler(checkpoint)
        self._load_edit_state(Path(checkpoint))

    def _load_edit_state(self, folder: Path) -> None:
        manifest = Manifest.read(folder)
        host = checkpoint.load_inner(folder, manifest, self._training())
        self.lr_scheduler.load_state_dict(host["stateful"]["scheduler"])
        self._resumed, self._resumed_host = (folder, manifest), host
        self._say_what_was_mapped(manifest)

    def _say_what_was_mapped(self, manifest: Manifest) -> None:
        saved = Layout(manifest.num_replicas, manifest.replica_size, 0)
        here = self.edit_layout
        if (saved.num_replicas, saved.replica_size) != (here.num_replicas, here.replica_size):
            pairs = ", ".join(f"{i} from {i % saved.num_replicas}" for i in range(here.num_replicas))
            outer = "are cut anew" if here.num_replicas > 1 else "are not needed"
            self._say_once(
                f"the checkpoint is of {saved}, this run has {here}: anchor and outer momentum {outer}; inner "
                f"optimizer and scheduler of replica {pairs}."
            )
        if here.num_replicas > 1 and (changed := differences(manifest, self.edit_config.to_dict())):
            changes = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
            self._say_once(
                f"the checkpoint was trained with other settings; from here on the new ones hold: {changes}."
            )

    def _load_best_model(self) -> None:
        if not self._writes_files():  # it may not be there yet, and nobody asks this replica for it
            return
        reshard(self.model)  # the last evaluation may have left gathered copies, into which shards cannot be loaded
        super()._load_best_model()

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._resumed is None:
            return super()._load_scaler(checkpoint)
        if self.accelerator.scaler is not None and "scaler" in self._resumed_host["stateful"]:
            self.accelerator.scaler.load_state_dict(self._resumed_host["stateful"]["scaler"])

    # -- out ----------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._engine is None:
            return super()._save_checkpoint(model, trial)
        self._make_replicas_equal("save")
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if not self._writes_files():
            if self.state.best_global_step:
                best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
                self.state.best_model_checkpoint = str(best)
            if not self.args.save_only_model:
                self._save_part(folder)
            return
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EDiTCheckpointMark):  # on_step_end would be too early: A-EDiT's step is agreed on
                callback.step = self.state.global_step
        if not self.args.save_only_model:
            if self._writes_shared():
                start(folder)
            self._get_peers().barrier()  # nobody writes into it before
        super()._save_checkpoint(model, trial)
        if not folder.exists():
            self._say_once(
                f"save_total_limit={self.args.save_total_limit} has deleted {folder}, which was just saved: other "
                "checkpoints in output_dir look newer to the Trainer. Remove them, or set another output_dir."
            )
        elif not self.args.save_only_model and self._writes_shared():
            sync_to_disk(folder / "trainer_state.json")  # the older checkpoints may be gone
            sync_to_disk(folder)

    def _writes_shared(self) -> bool:
        """True on the rank that makes and seals the folder: the world's first, or each host's with its own disk."""
        return self.args.local_process_index == 0 if self.args.save_on_each_node else self.args.process_index == 0

    def _writes_outer(self) -> bool:
        """True on all ranks of the replica that `_writes_shared` is in."""
        if self.edit_config.elastic:
            return True
        if self.args.save_on_each_node:
            return self.args.local_process_index == self.edit_layout.shard
        return self.edit_layout.replica == 0

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._engine is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        if saves_sharded(self.accelerator):
            # The Trainer would have every replica write the same names, and mix their optimizer states.
            if self._writes_outer():
                save_sharded(self.model, self.optimizer, output_dir, self._training().group)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        self._save_own(Path(output_dir), self._writes_outer())

    def _save_own(self, folder: Path, write_outer: bool) -> None:
        """This rank's part of `folder`/edit."""
        scaler = self.accelerator.scaler
        stateful = {"scheduler": self.lr_scheduler} | ({} if scaler is None else {"scaler": scaler})
        host = {"rank": self._rank_state(), "stateful": {name: thing.state_dict() for name, thing in stateful.items()}}
        checkpoint.save(folder, self._training(), self.state.global_step, host, write_outer=write_outer)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._engine is None or not self._writes_files():
            return
        self._get_peers().barrier()  # every rank has written its part
        if self._writes_shared():
            manifest = checkpoint.describe(
                self._training(), self.state.global_step, self.edit_config, self._replicas_of_the_folder(),
                self._meeting_key,
            )  # fmt: skip
            seal(Path(output_dir), manifest)

    def _replicas_of_the_folder(self) -> range:
        """Whose parts `seal` must find: all, or with a disk of its own for each host those of this one."""
        if self.edit_config.elastic:
            return range(self.edit_layout.replica, self.edit_layout.replica + 1)
        if not self.args.save_on_each_node:
            return range(self.edit_layout.num_replicas)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // self.edit_layout.replica_size
        return range(self.edit_layout.replica, self.edit_layout.replica + here)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, on equal replicas.

        With fsdp_state_dict_type SHARDED_STATE_DICT the Trainer would write nothing; here the whole model is gathered
        on rank 0, except inside checkpoints, which hold it in shards.
        """
        self._make_replicas_equal("save_model")
        if not self._writes_files():
            return
        if _internal_call or self.edit_layout.num_replicas == 1 or not saves_sharded(self.accelerator):
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, state_dict=full_state_dict(self.model))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
