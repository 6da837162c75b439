"""The command line: ``paravae demo | decode | encode | bench | plan | engine``, alone or on each rank of torchrun."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from types import ModuleType
from typing import Any, NoReturn

import paravae
from paravae.launch import (
    bench,
    calibrate,
    decode,
    demo,
    encode,
    engine,
    engine_build,
    engine_list,
    engine_verify,
    plan,
)
from paravae.launch.errors import leave_at_once, report
from paravae.launch.world import Place, place_from_environment

COMMANDS = {
    "demo": (demo, "decode a photograph in every mode on two CPU ranks, and show what differs"),
    "decode": (decode, "latents in a file -> a picture, a folder of frames or a video"),
    "encode": (encode, "a picture, a folder of frames or a video -> latents in a file"),
    "bench": (bench, "how long decode and encode take here, checked first, and beside diffusers if asked"),
    "plan": (plan, "which ranks would decode what, and how long it would take; needs no GPU"),
    "engine": (engine, "build, list and verify TensorRT engines"),
}
SUBCOMMANDS = {
    "bench": {"calibrate": (calibrate, "measure the constants by which auto chooses, on this machine")},
    "engine": {
        "build": (engine_build, "for pictures of given sizes, of any size, or for ranks that share one; needs no GPU"),
        "list": (engine_list, "which engines a folder holds, and which of them are broken; needs no GPU"),
        "verify": (engine_verify, "run every engine of a folder on this GPU, beside PyTorch"),
    },
}


class Parser(argparse.ArgumentParser):
    """Raises what argparse would print, so that N ranks say it once; takes no abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help explains)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``args.run`` is the command's function."""
    parser = Parser(prog="paravae", description=paravae.__doc__)
    parser.add_argument("--version", action="version", version=f"paravae {paravae.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = _add_command(commands, name, module, summary)
        if name in SUBCOMMANDS:  # a command alone, too
            further = command.add_subparsers(metavar=" | ".join(SUBCOMMANDS[name]))
            for word, (submodule, about) in SUBCOMMANDS[name].items():
                _add_command(further, word, submodule, about)
    return parser


def _add_command(commands: Any, name: str, module: ModuleType, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=(module.__doc__ or "").split(": ", 1)[-1]
    )
    module.add_flags(command)
    command.add_argument("--debug", action="store_true", help="show where an error was raised")
    command.set_defaults(run=module.run)
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 0 done, 1 failed, 2 bad input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    place = Place()
    with _logging():
        try:
            place = place_from_environment()
            if place.rank > 0:
                logging.getLogger("paravae").setLevel(logging.WARNING)
            with redirect_stdout(sys.stdout if place.rank == 0 else io.StringIO()):  # --help, once
                args = build_parser().parse_args(arguments)
            args.run(args, place)
        except Exception as error:
            status = report(error, place, debug="--debug" in arguments)
            if place.size > 1:
                leave_at_once(status)
            return status
        except KeyboardInterrupt:
            print("paravae: interrupted", file=sys.stderr)
            return 130
        if place.size > 1:
            leave_at_once(0)
    return 0


class _Stderr(logging.Handler):
    """Short lines on whatever stderr is at the time: while a progress bar is drawn, the bar's."""

    def emit(self, record: logging.LogRecord) -> None:
        grave = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(f"paravae: {grave}{record.getMessage()}", file=sys.stderr, flush=True)


@contextmanager
def _logging() -> Iterator[None]:
    """Log paravae's INFO to stderr while a command runs; the loggers of a program that called us stay as they were."""
    logger, handler = logging.getLogger("paravae"), _Stderr()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
