"""What connects the members of one meeting: a process group of their own, until something in it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from hf_edit.method.membership import Meeting
from hf_edit.peers.faults import start
from hf_edit.peers.layout import Layout
from hf_edit.peers.lighthouse import new_group

logger = logging.getLogger(__name__)

ERROR_LENGTH = 200  # of what is shown of an error's text


class Connection:
    """The process group between the members of one meeting, and the operations under way in it.

    The first failure ends it, and raises nothing: what is under way ends without effect, nothing more is started, and
    `error` says why, until whoever opens it anew has set that to None. The others see the end at once if nothing here
    holds the group any more. A Work does: after a failure every reference to one must go.

    Args:
        layout: where this rank is among all R replicas.
    """

    def __init__(self, layout: Layout) -> None:
        self.link = ""  # the key of the meeting at which it was made; "": there is none
        self.error: str | None = None
        self._layout = layout
        self._group: Any = None
        self._launches: list[str] = []  # who it is with
        self._operations: list[Operation] = []

    def open(self, meeting: Meeting, patience_seconds: float) -> None:
        """Connects the members of `meeting`; what all of them have from an earlier one stays as it is.

        Args:
            patience_seconds: longest wait without progress.
        """
        launches = [member.launch for member in meeting.members]
        same = launches == self._launches and {member.link for member in meeting.members} == {self.link}
        if self._group is not None and same:
            return
        self.drop()
        self._launches = launches
        if len(launches) == 1:
            return
        group = new_group(patience_seconds)
        place = f"{meeting.members[0].store}/{meeting.key}/{self._layout.shard}"
        replica = self._layout.replica
        try:
            group.configure(place, f"edit_{replica}", meeting.replicas.index(replica), len(launches))
        except RuntimeError as error:  # torch's DistError and gloo's
            self.fail(str(error))
            return
        self._group, self.link = group, meeting.key

    def start(self, collective: Callable[..., Any], *tensors: Any) -> Operation:
        """As `faults.start`; nothing where this replica is alone, or after a failure."""
        operation = Operation(self)
        if self.error is None and self._group is not None:
            self._operations = [one for one in self._operations if one.work is not None]
            try:
                operation.work = start(collective, *tensors, group=self._group)
            except RuntimeError as error:
                self.fail(str(error))
            else:
                self._operations.append(operation)
        return operation

    def fail(self, why: str) -> None:
        """Ends it, because of `why`."""
        if self.error is None:
            short = (why.splitlines() or ["it does not say why"])[0][:ERROR_LENGTH]
            replica = self._layout.replica
            logger.warning("EDiT: a sync of replica %d came to nothing, and is tried again: %s", replica, short)
        self.error = why
        self.drop()

    def drop(self) -> None:
        """Gives it up, with all that holds it: the others see the end of it at once."""
        operations, self._operations = self._operations, []
        for operation in operations:
            if operation.work is not None:
                operation.work.let_go()
                operation.work = None
        if self._group is not None:
            self._group.shutdown()
            self._group, self.link = None, ""


class Operation:
    """One that is under way; `work` is None where there is nothing to wait for."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.work: Any = None

    def wait(self) -> None:
        work, self.work = self.work, None
        if work is None:
            return
        try:
            work.wait()
        except RuntimeError as error:
            why = str(error)
        else:
            return
        # Only here, where the error is gone: its traceback holds the Work, too.
        work.let_go()
        del work
        self._connection.fail(why)


class Operations:
    """Several `Operation`s."""

    def __init__(self, operations: list[Operation]) -> None:
        self._operations = operations

    def wait(self) -> None:
        for operation in self._operations:
            operation.wait()
