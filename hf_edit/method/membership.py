"""Who takes part in a sync of replicas that come and go, and who heals whom: the same on all members, from what each
of them says of itself. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

KEPT_COMMITS = 16  # that a replica tells of
START_SECONDS = 30.0  # that a majority waits for the others before the first step of all


@dataclass(frozen=True)
class News:
    """What a replica says of itself when it comes to a sync."""

    replica: int
    launch: str  # unique
    launched_at: float  # seconds since 1970: a later launch of the same replica takes its place
    store: str  # "host:port", where its ranks and the others' meet
    port: int  # of that host, where it hears that it is not waited for any more
    settings: str  # equal on all replicas
    sync: int  # the last sync whose outcome it holds; 0: none, it has its initial parameters
    commits: tuple[str, ...]  # keys of the last meetings that it has committed, newest last
    quorum: int  # number of the last meeting that it was at; -1: none
    link: str  # key of the meeting at which its connection was made; "": it has none
    patient: bool  # it has looked again for who may have met without it
    waited_seconds: float  # since it began to look for others

    @classmethod
    def read(cls, values: dict[str, Any]) -> News:
        return cls(**{**values, "commits": tuple(values["commits"])})

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "commits": list(self.commits)}

    @property
    def last_commit(self) -> str:
        return self.commits[-1] if self.commits else ""


@dataclass(frozen=True)
class Meeting:
    """A sync's members, in ascending order, as one of them sees it.

    `key` is this meeting's alone, and later ones have larger keys. `quorum` counts the meetings of changing members:
    one of other members than the one before has the next number.
    """

    key: str
    quorum: int
    members: tuple[News, ...]

    @property
    def replicas(self) -> list[int]:
        return [member.replica for member in self.members]

    @property
    def source(self) -> News:
        """The member that heals the others: it holds the last sync, and of two such the one that was committed last."""
        return max(self.members, key=lambda member: (member.sync, member.last_commit, -member.replica))

    @property
    def sync(self) -> int:
        """The last one that any member holds."""
        return self.source.sync

    @property
    def stale(self) -> list[int]:
        """The replicas that lack a sync of the source's, or anything but their initial parameters."""
        source = self.source
        return [
            member.replica
            for member in self.members
            if member is not source
            and (member.last_commit != source.last_commit or member.sync != source.sync or not source.sync)
        ]

    @property
    def missed(self) -> list[int]:
        """How many syncs each member lacks; 0 for one that has none at all, and nothing to tell."""
        return [self.sync - member.sync if member.sync else 0 for member in self.members]

    @property
    def fresh(self) -> list[int]:
        """Those of the stale that have no inner optimizer's state either."""
        stale = self.stale
        return [member.replica for member in self.members if member.sync == 0 and member.replica in stale]

    def committed(self, key: str) -> bool:
        """True if others have committed the meeting `key`, whatever this replica came to know of it."""
        return any(key in member.commits for member in self.members)

    @property
    def must_look_again(self) -> bool:
        """True if others may have met since any of these did, and may be about to come: they would be left behind."""
        known = max(member.quorum for member in self.members)
        return (
            self.sync > 0 and known not in (self.quorum - 1, self.quorum) and not all(m.patient for m in self.members)
        )


def members_of(everyone: Sequence[News]) -> tuple[News, ...]:
    """One for each replica, the latest launch of it, in ascending order."""
    latest: dict[int, News] = {}
    for news in everyone:
        if news.replica not in latest or news.launched_at > latest[news.replica].launched_at:
            latest[news.replica] = news
    return tuple(latest[replica] for replica in sorted(latest))


def why_wait(members: Sequence[News], num_replicas: int, min_replicas: int) -> str:
    """Why these do not sync yet; "" if they do.

    Replicas that all have their initial parameters alone begin with a majority, so that none takes over while others
    train on that it cannot see.
    """
    here = f"{len(members)} of {num_replicas} replicas {'is' if len(members) == 1 else 'are'} here"
    if all(member.sync == 0 for member in members):
        needed = max(min_replicas, num_replicas // 2 + 1)
        if len(members) < needed:
            return f"{here}; {needed} must be, to begin"
        if len(members) < num_replicas and max(member.waited_seconds for member in members) < START_SECONDS:
            return f"{here}; {START_SECONDS:.0f} s are waited for the others, to begin"
    return f"{here}; min_replicas={min_replicas}" if len(members) < min_replicas else ""
