"""What a command says when it fails: one line, once among all ranks, and the exit status on each of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

from paravae.launch.world import Place
from paravae.vae.comm import RankError, RankGroup

INPUT_STATUS, FAILURE_STATUS = 2, 1
_INPUT_FAULTS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError)
_WAIT_FOR_WORDS_S = 5.0  # for the rank at fault to say why
_WAIT_FOR_OTHERS_S = 2.0  # for the others to end by themselves, before torchrun ends them


class InputError(ValueError):
    """The user's files or flags are at fault."""


@contextmanager
def agreed(group: RankGroup, step: str) -> Iterator[None]:
    """``group.agreement`` for a step that reads what the user gave: a file that is missing, or a place that
    cannot be written, then counts as bad input on every rank."""
    with group.agreement(step):
        try:
            yield
        except _INPUT_FAULTS as error:
            raise InputError(str(error)) from error


def status_of(error: BaseException) -> int:
    """The exit status of a command that ended with ``error``."""
    if isinstance(error, RankError):
        return INPUT_STATUS if error.input_error else FAILURE_STATUS
    return INPUT_STATUS if isinstance(error, ValueError) else FAILURE_STATUS


def report(error: BaseException, place: Place, debug: bool) -> int:
    """Say on stderr what went wrong, once among the ranks, and return the exit status."""
    status = status_of(error)
    if place.size > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, once one has gone; all end soon by themselves
    if debug:
        traceback.print_exception(error)
    line = "paravae: error: " + _in_one_line(error, place, status)
    if place.store is None:
        print(line, file=sys.stderr, flush=True)
        return status
    try:
        _say_once(line, place, first_hand=not isinstance(error, RankError) or error.gone)
    except Exception:  # the store went down with the rank that kept it: better twice than never
        print(line, file=sys.stderr, flush=True)
    return status


def leave_at_once(status: int) -> NoReturn:
    """End this rank without any tidying up, which could wait for a rank that is gone, or be cut short by torchrun.

    After a success too: a thread of gloo's may be the last to hold a tensor of the last collective, and if it lets go
    while the interpreter shuts down, the process aborts (seen once in CI; pytorch/pytorch issue 190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _in_one_line(error: BaseException, place: Place, status: int) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if status == FAILURE_STATUS and not isinstance(error, RankError):
        if not isinstance(error, OSError | RuntimeError | MemoryError):
            text = f"{type(error).__name__}: {text} (a fault of paravae; --debug shows where)"
        if place.size > 1:
            text = f"rank {place.rank} of {place.size}: {text}"
    return text


def _say_once(line: str, place: Place, first_hand: bool) -> None:
    """The first rank that failed by itself speaks; one that failed only because another did lets that one speak, if
    that one still can.

    torchrun ends all ranks as soon as one has ended, so none goes before the line is out and, if it does not
    take long, before all are ready to go with their own status.
    """
    store = place.store
    assert store is not None
    if first_hand and store.add("speakers", 1) == 1:
        print(line, file=sys.stderr, flush=True)
        store.set("said", "")
    else:
        try:
            store.wait(["said"], timedelta(seconds=_WAIT_FOR_WORDS_S))
        except RuntimeError:
            print(line, file=sys.stderr, flush=True)
    deadline = time.monotonic() + _WAIT_FOR_OTHERS_S
    store.add("ended", 1)
    while store.add("ended", 0) < place.size and time.monotonic() < deadline:
        time.sleep(0.02)
