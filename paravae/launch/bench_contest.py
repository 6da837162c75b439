"""One case of the benchmark: everyone is checked against the truth, then timed in turns."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paravae import AutoencoderKLQwenImage
from paravae.launch import bench_cost, bench_timing
from paravae.launch.bench_cases import Case
from paravae.launch.bench_errors import Truth, errors, judge
from paravae.launch.bench_model import Model, plain
from paravae.launch.bench_peers import Peer, ours
from paravae.launch.world import World

logger = logging.getLogger("paravae")

Row = dict[str, Any]


@dataclass(frozen=True)
class Contest:
    """Who is timed, on what and how. ``truth``: plain, in fp32; ``rates``: of ``bench_timing.machine_rates``."""

    model: Model
    truth: AutoencoderKLQwenImage
    peers: Sequence[Peer]
    rates: Mapping[str, float]
    dtype: torch.dtype
    here: World
    repeats: int
    warmup: int

    @staticmethod
    def prepare(
        model: Model, peers: Sequence[Peer], dtype: torch.dtype, here: World, *, repeats: int, warmup: int
    ) -> Contest:
        """Build the truth and measure the machine's rates."""
        truth = model.build(plain(model.config), torch.float32, here.device)
        rates = bench_timing.machine_rates(here.device)
        return Contest(model, truth, peers, rates, dtype, here, repeats, warmup)

    def run(self, case: Case) -> list[Row]:
        """A row for each contestant, paravae's first. A peer that fails has a row that says why.

        paravae is built anew for each case: neither memory nor graphs of an earlier shape count in this one.
        """
        gc.collect()  # the last case's model, should anything in it refer to itself
        given = case.draw_input(self.model.config.arch_config).to(self.here.device, self.dtype)
        vae = self.model.build(self.model.config, self.dtype, self.here.device)
        truth = Truth(self.truth, case.what, given)
        own = ours(vae)
        rows = {own.name: self._checked(own, case, given, lambda: truth.result(_tiled(vae)))}
        if case.what == "decode" and vae.last_choice:
            rows[own.name]["ran"] = vae.last_choice.how
        for peer in self.peers:
            rows[peer.name] = self._checked_peer(peer, case, given, lambda: truth.result(False))
        judge(list(rows.values()))
        contestants = [peer for peer in (own, *self.peers) if "failed" not in rows[peer.name]]
        self._time(rows, contestants, case, given)
        return list(rows.values())

    def _checked_peer(self, peer: Peer, case: Case, given: Tensor, truth: Callable[[], Tensor]) -> Row:
        try:
            return self._checked(peer, case, given, truth)
        except Exception as error:  # whatever it is of another's code, it is a result; the others go on
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            logger.warning("%s: %s failed: %s", case, peer.name, reason)
            return {"who": peer.name, **case.head(), "failed": reason}

    def _checked(self, peer: Peer, case: Case, given: Tensor, truth: Callable[[], Tensor]) -> Row:
        """The row of a contestant's first calls: the errors of the last of them, and their memory and a later one's."""
        call, other = peer.call(case.what), -given

        def first_calls() -> Tensor:
            for _ in range(self.warmup):
                call(other)  # other values: what a replayed graph kept of them would show as an error
            return call(given)

        out, peaks = bench_timing.with_peaks(first_calls, lambda: call(given), self.here.device)
        measured = {**errors(out, truth()), **peaks}
        return {"who": peer.name, **case.head(), **self._of_all_ranks(measured)}

    def _time(self, rows: Mapping[str, Row], contestants: Sequence[Peer], case: Case, given: Tensor) -> None:
        """Add times, and what they mean, to the contestants' rows."""
        calls = {peer.name: _bound(peer.call(case.what), given) for peer in contestants}
        times = bench_timing.interleaved_ms(calls, self.repeats, self.here.device)
        arch = self.model.config.arch_config
        cost = bench_cost.count(self.model.config, case.what, case.latents_shape(arch), case.pixels_shape(arch))
        for peer in contestants:
            row = rows[peer.name]
            row.update(self._of_all_ranks(bench_timing.spread(times[peer.name])))
            row.update(self._shares(cost, row["ms"] / 1e3))
        told = ", ".join(f"{peer.name} {rows[peer.name]['ms']:.2f} ms" for peer in contestants)
        logger.info("%s: %s", case, told)

    def _shares(self, cost: bench_cost.Cost, seconds: float) -> Row:
        moved = cost.values * self.dtype.itemsize
        return {
            "flops": cost.flops,
            "block_bytes": moved,
            "matmul_share": round(cost.flops / seconds / (1e12 * self.rates["bf16_matmul_tflops"]), 4),
            "copy_share": round(moved / seconds / (1e9 * self.rates["copy_gb_per_s"]), 4),
        }

    def _of_all_ranks(self, values: Mapping[str, float | None]) -> Row:
        """Each value as the rank has it whose is largest."""
        group = self.here.group
        return {
            name: None if value is None else bench_timing.largest(name, value, group) for name, value in values.items()
        }


def _bound(call: Callable[[Tensor], Tensor], given: Tensor) -> Callable[[], Tensor]:
    return lambda: call(given)


def _tiled(vae: AutoencoderKLQwenImage) -> bool:
    return vae.last_choice is not None and vae.last_choice.mode == "tiled"
