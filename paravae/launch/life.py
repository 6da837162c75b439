"""One life of a job: the ranks that torchrun has started together, and nothing of those it had started before.

torchrun keeps its store when it starts the ranks anew, and PyTorch (seen with 2.13) then takes what the life before has
left there, addresses of processes that are gone, for this one's. So the ranks first make sure of each other, by words
that no rank has used before, and go on in a part of the store that is theirs alone.
"""

from __future__ import annotations

import time
import uuid

import torch.distributed as dist

_PAUSE_S = 0.01
_MEETING_S = 300.0


def store_of_this_life(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The part of ``store`` that only the ``size`` ranks of this life use. All ranks call this.

    Raises:
        TimeoutError: rank 0 has waited too long for the others.
    """
    meeting = dist.PrefixStore("paravae/meeting", store)
    own = uuid.uuid4().hex
    if rank == 0:
        _lead(meeting, own, size)
        return dist.PrefixStore(f"paravae/{own}", store)
    meeting.set(f"caller-{rank}", own)
    life = meeting.get(f"answer-{own}").decode()  # waits for it
    meeting.set(f"joined-{life}-{rank}", "")
    return dist.PrefixStore(f"paravae/{life}", store)


def _lead(meeting: dist.Store, life: str, size: int) -> None:
    """Tell every caller the name of this life until all have joined it. A caller of a life before does not, but the
    rank of this one calls in its place."""
    deadline = time.monotonic() + _MEETING_S
    missing = set(range(1, size))
    while missing:
        for rank in sorted(missing):
            if meeting.check([f"caller-{rank}"]):
                meeting.set(f"answer-{meeting.get(f'caller-{rank}').decode()}", life)
        missing = {rank for rank in missing if not meeting.check([f"joined-{life}-{rank}"])}
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} did not come within {_MEETING_S:g} s")
        time.sleep(_PAUSE_S)
