"""One case of the benchmark: everyone is checked against the truth, then timed in turns."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paravae import AutoencoderKLQwenImage, VAEConfig
from paravae.launch import bench_cost, bench_timing
from paravae.launch.bench_cases import Case
from paravae.launch.bench_errors import ERRORS, OURS, Truth, errors, judge
from paravae.launch.bench_model import Model, plain
from paravae.launch.bench_peers import Peer, ours
from paravae.launch.planned import Way, WayOfDecoding
from paravae.launch.world import World
from paravae.vae.memory import GIB, device_bytes

logger = logging.getLogger("paravae")

Row = dict[str, Any]

_ROOM = 0.7  # of a device's memory: what everyone's leftovers may fill before they hinder each other

COMPARED_WORDS = (
    "from_alone_max, from_alone_rms: the difference from what paravae gives on one device. from_exact_max, "
    "from_exact_rms: of an approximate decode, which is held against the same tiles on one device (paravae's in fp32, "
    "others' by diffusers' own class in the benched dtype), the difference from the exact fp32 one."
)


@dataclass(frozen=True)
class Own:
    """A way to run paravae; ``alone`` as a ``Peer``'s. ``way``: of decoding, whatever it would choose."""

    config: VAEConfig
    name: str = OURS
    alone: bool = False
    way: Way | None = None

    def peer(self, vae: AutoencoderKLQwenImage) -> Peer:
        """It, run by ``vae``."""
        peer = ours(vae, self.name, alone=self.alone)
        if self.way is None:
            return peer
        return replace(peer, decode=WayOfDecoding(vae, self.way), what_ran=f"{peer.what_ran}, as {self.way.name}")


@dataclass(frozen=True)
class Contest:
    """Who is timed, on what and how.

    ``own``: paravae's runs, at least one; ``truth``: plain, in fp32; ``rates``: of ``bench_timing.machine_rates``;
    ``seconds``: of timed calls for one that takes long (``bench_timing.turns_ms``).
    """

    model: Model
    truth: AutoencoderKLQwenImage
    own: Sequence[Own]
    peers: Sequence[Peer]
    rates: Mapping[str, float]
    dtype: torch.dtype
    here: World
    repeats: int
    warmup: int
    seconds: float | None = None

    @staticmethod
    def prepare(
        model: Model,
        peers: Sequence[Peer],
        dtype: torch.dtype,
        here: World,
        *,
        repeats: int,
        warmup: int,
        own: Sequence[Own] = (),
        seconds: float | None = None,
    ) -> Contest:
        """Build the truth and measure the machine's rates. Without ``own`` paravae runs as the model's config says."""
        truth = model.build(plain(model.config), torch.float32, here.device)
        rates = bench_timing.machine_rates(here.device)
        own = own or [Own(model.config)]
        return Contest(model, truth, own, peers, rates, dtype, here, repeats, warmup, seconds)

    def run(self, case: Case) -> list[Row]:
        """A row for each contestant, paravae's first. A peer that fails has a row that says why.

        paravae is built anew for each case: neither memory nor graphs of an earlier shape count in this one.
        """
        gc.collect()  # the last case's models, should anything in them refer to themselves
        given = case.draw_input(self.model.config.arch_config).to(self.here.device, self.dtype)
        truth = Truth(self.truth, case.what, given)
        rows: dict[str, Row] = {}
        peers, results = [], {}
        for own in self.own:
            vae = self.model.build(own.config, self.dtype, self.here.device)
            peers.append(own.peer(vae))
            rows[own.name], results[own.name] = self._checked_own(vae, peers[-1], case, given, truth)
        self._compare(rows, results)
        del results
        for peer in self.peers:
            rows[peer.name] = self._checked_peer(peer, case, given, truth)
        judge(list(rows.values()))
        contestants = [peer for peer in (*peers, *self.peers) if "failed" not in rows[peer.name]]
        self._time(rows, contestants, case, given)
        return list(rows.values())

    def _checked_own(
        self, vae: AutoencoderKLQwenImage, peer: Peer, case: Case, given: Tensor, truth: Truth
    ) -> tuple[Row, Tensor | None]:
        row, result = self._checked(peer, case, given, lambda: truth.result(_tiled(vae)))
        if case.what == "decode" and vae.last_choice:
            row["ran"], row["mode"] = vae.last_choice.how, vae.last_choice.mode
            row["predicted_ms"] = vae.last_choice.ms
            if _tiled(vae):
                row.update(self._from_exact(result, truth))
        return row, result

    def _checked_peer(self, peer: Peer, case: Case, given: Tensor, truth: Truth) -> Row:
        tiles = peer.tiles
        try:
            if tiles is None:
                return self._checked(peer, case, given, lambda: truth.result(False))[0]
            row, result = self._checked(peer, case, given, lambda: tiles(given))
            return {**row, **self._from_exact(result, truth)}
        except Exception as error:  # whatever it is of another's code, it is a result; the others go on
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            logger.warning("%s: %s failed: %s", case, peer.name, reason)
            return {"who": peer.name, **case.head(), "failed": reason}

    def _checked(
        self, peer: Peer, case: Case, given: Tensor, held_against: Callable[[], Tensor]
    ) -> tuple[Row, Tensor | None]:
        """The row of a contestant's first calls, and the last one's result on the host, if this rank has it: its
        errors, and the memory of these calls and a later one."""
        call, other = peer.call(case.what), -given

        def first_calls() -> Tensor:
            for _ in range(self.warmup):
                call(other)  # other values: what a replayed graph kept of them would show as an error
            return call(given)

        measured: dict[str, float | None] = {**dict.fromkeys(ERRORS, 0.0), **bench_timing.no_peaks(self.here.device)}
        result = None
        with self.here.group.agreement(f"check {peer.name}, {case}"):  # where one rank fails, all know it
            if self._works(peer):
                out, peaks = bench_timing.with_peaks(first_calls, lambda: call(given), self.here.device)
                measured = {**errors(out, held_against()), **peaks}
                result = out.cpu()
        return {"who": peer.name, **case.head(), **self._of_all_ranks(measured)}, result

    def _from_exact(self, result: Tensor | None, truth: Truth) -> Row:
        """How far an approximate result is from the exact one."""
        found = dict.fromkeys(ERRORS, 0.0) if result is None else errors(result, truth.result(False))
        largest = self._of_all_ranks({"max": found["max_error"], "rms": found["rms_error"]})
        return {f"from_exact_{name}": value for name, value in largest.items()}

    def _compare(self, rows: Mapping[str, Row], results: Mapping[str, Tensor | None]) -> None:
        """Add to paravae's shared runs how far their results are from that of its run on one device."""
        alone = next((own.name for own in self.own if own.alone), None)
        if alone is None:
            return
        one = results[alone]
        for own in self.own:
            result = results[own.name]
            if not own.alone:
                found = dict.fromkeys(ERRORS, 0.0) if one is None or result is None else errors(result, one)
                gaps = {"from_alone_max": found["max_error"], "from_alone_rms": found["rms_error"]}
                rows[own.name].update(self._of_all_ranks(gaps))

    def _time(self, rows: Mapping[str, Row], contestants: Sequence[Peer], case: Case, given: Tensor) -> None:
        """Add times, and what they mean, to the contestants' rows."""
        calls = {peer.name: _bound(peer.call(case.what), given) if self._works(peer) else _wait for peer in contestants}
        together = self._have_room([rows[peer.name] for peer in contestants])
        device, group = self.here.device, self.here.group
        times = bench_timing.turns_ms(calls, self.repeats, device, group, seconds=self.seconds, together=together)
        arch = self.model.config.arch_config
        cost = bench_cost.count(self.model.config, case.what, case.latents_shape(arch), case.pixels_shape(arch))
        for peer in contestants:
            row = rows[peer.name]
            row.update(bench_timing.spread(times[peer.name]))
            row.update(self._shares(cost, row["ms"] / 1e3, 1 if peer.alone else self.here.size))
            row.update(calls=len(times[peer.name]), together=together)
        told = ", ".join(f"{peer.name} {rows[peer.name]['ms']:.2f} ms" for peer in contestants)
        logger.info("%s: %s", case, told)

    def _works(self, peer: Peer) -> bool:
        return self.here.rank == 0 or not peer.alone

    def _have_room(self, rows: Sequence[Row]) -> bool:
        """Whether the device can keep what all of them leave in PyTorch's cache; the same on every rank."""
        if self.here.device.type != "cuda":
            return True
        memory = self.here.group.minimum("device memory", device_bytes(self.here.device))
        return sum(row["peak_gib"] for row in rows) * GIB < _ROOM * memory

    def _shares(self, cost: bench_cost.Cost, seconds: float, devices: int) -> Row:
        moved, spent = cost.values * self.dtype.itemsize, devices * seconds
        return {
            "flops": cost.flops,
            "block_bytes": moved,
            "matmul_share": round(cost.flops / spent / (1e12 * self.rates["bf16_matmul_tflops"]), 4),
            "copy_share": round(moved / spent / (1e9 * self.rates["copy_gb_per_s"]), 4),
        }

    def _of_all_ranks(self, values: Mapping[str, float | None]) -> Row:
        """Each value as the rank has it whose is largest."""
        group = self.here.group
        return {
            name: None if value is None else bench_timing.largest(name, value, group) for name, value in values.items()
        }


def _bound(call: Callable[[Tensor], Tensor], given: Tensor) -> Callable[[], Tensor]:
    return lambda: call(given)


def _wait() -> None:
    """What a rank does while another works alone: it meets it again before the next call."""


def _tiled(vae: AutoencoderKLQwenImage) -> bool:
    return vae.last_choice is not None and vae.last_choice.mode == "tiled"
