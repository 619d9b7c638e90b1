"""Parts that come into a checkpoint after it was sealed: of replicas that come and go.

One of them writes the checkpoint, with its own part alone, and waits for nobody. Every other one writes its part beside
it and moves it in, in one step, when the checkpoint is there. A part that never comes is no harm: in its place its
replica takes the part of another.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from hf_edit.checkpoint.manifest import EDIT_FOLDER, Manifest, replica_part
from hf_edit.checkpoint.storage import sync_all_to_disk, sync_to_disk

LAST_WAIT_SECONDS = 10.0  # of a replica that ends, for a checkpoint that another one is about to seal
LOOK_SECONDS = 0.1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatePart:
    """The part of `replica` for `checkpoint`, which lies in `place` like in a checkpoint.

    `meeting` is the key of the sync behind which both are written: of an earlier run there may be a checkpoint of the
    same name, which its writer is about to replace.
    """

    checkpoint: Path
    place: Path
    replica: int
    meeting: str

    def begin(self) -> None:
        """Makes `place` anew; what was in it came too late."""
        if self.place.exists():
            shutil.rmtree(self.place)
        (self.place / EDIT_FOLDER).mkdir(parents=True)

    @property
    def folder(self) -> Path:
        return self.place / replica_part(self.replica)

    def bring(self) -> bool:
        """Moves it into the checkpoint, if that is sealed; False if it is not."""
        try:
            sealed = Manifest.read(self.checkpoint).meeting == self.meeting
        except (OSError, ValueError):  # not written yet, or to its end
            sealed = False
        target = self.checkpoint / replica_part(self.replica)
        if not sealed or target.exists():  # it was saved twice behind one sync, and is about to be replaced
            return False
        sync_all_to_disk(self.folder)
        try:
            os.replace(self.folder, target)
        except FileNotFoundError:  # it has been deleted since, with all that was in it
            return False
        sync_to_disk(target.parent)
        shutil.rmtree(self.place)
        return True

    def bring_at_last(self) -> bool:
        """As `bring`, by a replica that ends: it waits some seconds for a checkpoint that is under way."""
        deadline = time.monotonic() + LAST_WAIT_SECONDS
        while not (brought := self.bring()) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        if not brought:
            logger.warning(
                "EDiT: %s was not seen whole here within %.0f s, so replica %d's part of it is not kept; resumed, it "
                "takes another's. Let all hosts share its folder, or with EDiTTrainer set save_on_each_node=True.",
                self.checkpoint, LAST_WAIT_SECONDS, self.replica,
            )  # fmt: skip
            shutil.rmtree(self.place)
        return brought
