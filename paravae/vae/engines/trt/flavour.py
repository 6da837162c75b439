"""TensorRT itself: the one place that imports it, and a thin, checked layer over its builder.

There are two flavours of one interface: ``tensorrt`` for data-centre GPUs, and ``tensorrt_rtx`` for RTX GPUs, whose
builder needs no GPU, while its runtime refuses to start without one. TensorRT says that it failed by None, False or -1
and a message to its logger; here every such answer is an error that carries the messages. It keeps bare pointers to
what it is given: the logger therefore lives as long as the process, and a build keeps all its objects together.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from paravae.vae.engines.trt.shapes import Profile

logger = logging.getLogger("paravae.tensorrt")

# The public package of a flavour, and the wheel's own module, which may be all there is.
_MODULES = {"tensorrt": ("tensorrt", "tensorrt_bindings"), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
FLAVOURS = tuple(_MODULES)
_INSTALL = {
    "tensorrt": "NVIDIA's TensorRT 10 with its Python package",
    "tensorrt_rtx": "pip install 'paravae[tensorrt]' (Linux, x86-64)",
}
_MOST_COMPLAINTS = 20

Watch = Callable[[float], None]
"""Told how much of a build is done, from 0 to 1."""


class NoTensorRTError(ValueError):
    """No flavour of TensorRT can be imported here."""


class BuildError(RuntimeError):
    """TensorRT could not build an engine; in its own words."""


@dataclass(frozen=True)
class Flavour:
    """One of the two, imported. ``logger``: what TensorRT writes its messages to."""

    name: str
    module: Any
    version: str
    logger: Any

    def complaints(self) -> str:
        """What TensorRT has logged as errors since this was last asked, in one line; nothing if it did not."""
        said = "; ".join(dict.fromkeys(self.logger.errors))
        self.logger.errors.clear()
        return said

    @property
    def keeps_timing_cache(self) -> bool:
        """TensorRT-RTX times nothing when it builds: since 1.2 its timing cache is deprecated and has no effect."""
        return self.name == "tensorrt"

    @property
    def targets(self) -> tuple[str, ...]:
        """The compute capabilities that an engine can be built for wherever it is built; none: for the GPU here."""
        if self.name != "tensorrt_rtx":
            return ()
        names = [name[2:] for name in self.module.ComputeCapability.__members__ if name.startswith("SM")]
        return tuple(f"{name[:-1]}.{name[-1]}" for name in names)


def find_flavour(*names: str) -> Flavour:
    """The first of the flavours ``names`` (by default any) that can be imported.

    Raises:
        NoTensorRTError: none can; and why.
    """
    reasons = []
    for name in names or FLAVOURS:
        try:
            return _imported(name)
        except NoTensorRTError as error:
            reasons.append(str(error))
    raise NoTensorRTError("; ".join(reasons))


@cache  # TensorRT registers one logger a process, for good
def _imported(name: str) -> Flavour:
    if name not in _MODULES:
        raise NoTensorRTError(f"there is no flavour {name!r} of TensorRT, only {' and '.join(FLAVOURS)}")
    reasons = []
    for module_name in _MODULES[name]:
        try:
            module = import_module(module_name)
        except (ImportError, OSError) as error:  # OSError: its libraries do not load
            reasons.append(str(error))
        else:
            return Flavour(name, module, str(module.__version__), _make_log(module))
    raise NoTensorRTError(f"{name} cannot be imported ({'; '.join(reasons)}); it needs {_INSTALL[name]}")


def _make_log(module: Any) -> Any:
    """TensorRT's logger: its messages go to ``logging``, its errors are kept for the exception that tells of them."""
    severity = module.ILogger.Severity
    failures = (severity.ERROR, severity.INTERNAL_ERROR)

    class Log(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=_MOST_COMPLAINTS)

        def log(self, level: Any, message: str) -> None:
            try:
                if level in failures:
                    self.errors.append(message)
                logger.log(logging.WARNING if level == severity.WARNING else logging.DEBUG, "%s", message)
            except BaseException:  # nothing may leave here: TensorRT's frames below know no exceptions
                self.errors.append("a message of TensorRT could not be logged")

    return Log()


# -------------------------------------------------------------------------------------------------- building


class NetworkBuild:
    """A network on its way to an engine, strongly typed: it computes in the types that its ONNX file states.

    Raises:
        BuildError: from every method; TensorRT refuses, and why.
    """

    def __init__(self, flavour: Flavour, onnx: Path) -> None:
        self._flavour, trt = flavour, flavour.module
        flavour.complaints()
        self._builder = self._made("builder", lambda: trt.Builder(flavour.logger))
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self._network = self._made("network", lambda: self._builder.create_network(typed))
        self._parser = self._made("parser", lambda: trt.OnnxParser(self._network, flavour.logger))
        self._config = self._made("configuration", self._builder.create_builder_config)
        self._monitor: Any = None
        if not self._parser.parse_from_file(str(onnx)):
            errors = [str(self._parser.get_error(index)) for index in range(self._parser.num_errors)]
            raise BuildError(f"TensorRT cannot read {onnx}: {'; '.join(errors) or flavour.complaints()}")
        if (self._network.num_inputs, self._network.num_outputs) != (1, 1):
            raise BuildError(f"{onnx} has not one input and one output, so it is no part of a VAE")

    @property
    def ports(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """Name, shape (-1: free) and TensorRT's name of the data type, of the input and of the output."""
        tensors = (self._network.get_input(0), self._network.get_output(0))
        return tuple((tensor.name, tuple(tensor.shape), tensor.dtype.name) for tensor in tensors)

    def take(self, profiles: Sequence[Profile]) -> None:
        """Say which sizes the engine takes. A single one is made part of the network, which is then static."""
        tensor = self._network.get_input(0)
        batch, channels, *size = tensor.shape
        if len(profiles) == 1 and profiles[0].is_static:
            wanted = profiles[0].opt
            if any(side not in (-1, want) for side, want in zip(size, wanted, strict=True)):
                raise BuildError(f"the network takes {tuple(size)}, not {wanted}")
            tensor.shape = (batch, channels, *wanted)
            return
        for profile in profiles:
            added = self._builder.create_optimization_profile()
            ends = ((batch, channels, *size) for size in (profile.min, profile.opt, profile.max))
            try:
                added.set_shape(tensor.name, *ends)
            except (RuntimeError, TypeError) as error:
                raise BuildError(f"TensorRT cannot take the profile {profile}: {error}") from error
            self._must(f"take the profile {profile}", self._config.add_optimization_profile(added) >= 0)

    def limit_workspace(self, most_bytes: int) -> None:
        self._config.set_memory_pool_limit(self._flavour.module.MemoryPoolType.WORKSPACE, most_bytes)

    def set_level(self, level: int) -> None:
        """0: built fastest, to 5: runs fastest."""
        self._config.builder_optimization_level = level

    def set_targets(self, capabilities: Sequence[str]) -> None:
        """Build for these compute capabilities, which are among ``Flavour.targets``."""
        known = self._flavour.module.ComputeCapability.__members__
        self._config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            target = known[f"SM{capability.replace('.', '')}"]
            self._must(f"build for {capability}", self._config.set_compute_capability(target, index))

    def use_timing_cache(self, content: bytes) -> bool:
        """Start from a timing cache; empty: a new one. False: this one is of another GPU or version."""
        with _without_deprecations():
            cache = self._config.create_timing_cache(content)
            return cache is not None and bool(self._config.set_timing_cache(cache, ignore_mismatch=False))

    def timing_cache(self) -> bytes:
        """What the timing cache holds by now."""
        with _without_deprecations():
            return bytes(self._must("give its timing cache", self._config.get_timing_cache()).serialize())

    def serialized(self, watch: Watch | None = None) -> bytes:
        """The engine. An exception that ``watch`` raises, and Ctrl-C, ends the build."""
        watch = watch or (lambda done: None)
        self._monitor = _make_monitor(self._flavour.module, watch)
        self._config.progress_monitor = self._monitor
        engine = self._builder.build_serialized_network(self._network, self._config)
        if self._monitor.stopped_by is not None:
            raise self._monitor.stopped_by
        blob = bytes(self._must("build the engine", engine))
        watch(1.0)  # TensorRT does not tell of the last steps
        return blob

    def _made(self, what: str, make: Callable[[], Any]) -> Any:
        try:
            return self._must(f"make a {what}", make())
        except TypeError as error:  # the bindings' word for a constructor that gave nothing
            raise BuildError(f"TensorRT cannot make a {what}: {self._flavour.complaints() or error}") from error

    def _must(self, what: str, done: Any) -> Any:
        """``done``, unless TensorRT says by it that it could not."""
        if done is None or done is False:
            raise BuildError(f"TensorRT cannot {what}: {self._flavour.complaints() or 'it gives no reason'}")
        return done


@contextmanager
def _without_deprecations() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _make_monitor(module: Any, watch: Watch) -> Any:
    """TensorRT's progress: phases of so many steps, in each of which other phases may run."""

    class Monitor(module.IProgressMonitor):
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.stopped_by: BaseException | None = None
            self.phases: dict[str, list[int]] = {}  # steps done and in all, outermost first
            self.done = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = [0, num_steps]

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                self.phases[phase_name][0] = step + 1
                self.done = max(self.done, self._fraction())  # a phase ends before its parent's step does
                watch(self.done)
            except BaseException as error:  # nothing may leave here, as in the logger
                self.stopped_by = error
            return self.stopped_by is None

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def _fraction(self) -> float:
            inner = 0.0
            for steps, total in reversed(self.phases.values()):
                inner = min((steps + inner) / max(total, 1), 1.0)
            return inner

    return Monitor()
