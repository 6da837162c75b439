"""What benchmarks/modulation.py times: the modulation of a transformer's block, and the bytes that each op must move.

B: batch, L: tokens, C: channels. A gate is written when it is a tensor of [B, L, C], and lazy as a pair of [B, C].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""A table of [B, C] for tokens whose index is 0, and one for the others."""
Gate = Tensor | Pair
Outputs = dict[str, Tensor]
"""{name: [B, L, C]}: what has to be written."""


class Tables(NamedTuple):
    """What a norm is modulated by, in the order in which the model has it."""

    shift: Pair
    scale: Pair
    gate: Pair


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    channels: int

    def head(self) -> dict[str, int]:
        """As a row of the result file has it."""
        return {"batch": self.batch, "tokens": self.tokens, "channels": self.channels}

    def __str__(self) -> str:
        return f"B={self.batch}, L={self.tokens}, C={self.channels}"


@dataclass(frozen=True)
class Inputs:
    """x, attention, mlp: [B, L, C], the residual stream and what is added to it; index: [B, L]; the tables of the
    block's two norms; their gates, written."""

    x: Tensor
    attention: Tensor
    mlp: Tensor
    index: Tensor
    tables1: Tables
    tables2: Tables
    gate1: Tensor
    gate2: Tensor

    @staticmethod
    def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        """As an edit has them: the tokens of the new picture first, index 0, then as many of the given ones, 1."""
        batch, tokens, channels = shape.batch, shape.tokens, shape.channels

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=generator.device, dtype=dtype)

        index = torch.zeros(batch, tokens, dtype=torch.int32, device=generator.device)
        index[:, tokens // 2 :] = 1
        table = 0.5 * draw(2 * batch, 6 * channels)  # views of it, as the model takes them
        pairs = [(part[:batch], part[batch:]) for part in table.chunk(6, dim=-1)]
        tables1, tables2 = Tables(*pairs[:3]), Tables(*pairs[3:])
        x, attention, mlp = (draw(batch, tokens, channels) for _ in range(3))
        gates = (chosen(tables.gate, index).contiguous() for tables in (tables1, tables2))
        return Inputs(x, attention, mlp, index, tables1, tables2, *gates)

    def with_tables(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        def changed(tables: Tables) -> Tables:
            return Tables(*((change(first), change(second)) for first, second in tables))

        return replace(self, tables1=changed(self.tables1), tables2=changed(self.tables2))

    def double(self) -> Inputs:
        names = ("x", "attention", "mlp", "gate1", "gate2")
        return replace(self.with_tables(Tensor.double), **{name: getattr(self, name).double() for name in names})


def chosen(gate: Gate, index: Tensor | None) -> Tensor:
    """A pair's table for each token, [B, L, C], or without an index the first, [B, 1, C]."""
    if isinstance(gate, Tensor):
        return gate
    first, second = (table[:, None] for table in gate)
    return first if index is None else torch.where(index[..., None] == 0, first, second)


class Way:
    """Someone's three ops; without an index the tables' first ones are for all tokens. ``name``: in the result file."""

    name: str
    words: str
    """What ran."""
    lazy = False
    """Whether it leaves gates pairs."""
    plain = True
    """Whether it has ops without an index."""

    def norm(self, x: Tensor, tables: Tables, index: Tensor | None) -> tuple[Tensor, Gate]:
        """(y, gate)"""
        raise NotImplementedError

    def residual_norm(
        self, x: Tensor, residual: Tensor, gate: Gate, tables: Tables, index: Tensor | None
    ) -> tuple[Tensor, Tensor, Gate]:
        """(y, residual + gate * x, the next gate)"""
        raise NotImplementedError

    def closing(self, x: Tensor, residual: Tensor, gate: Gate, index: Tensor | None) -> Tensor:
        """residual + gate * x"""
        raise NotImplementedError

    def prepared(self, inputs: Inputs) -> Inputs:
        """As it takes them; not timed."""
        return inputs


class Moved(NamedTuple):
    """What an op reads and writes, each once: tensors of [B, L, C], tables of [B, C], the index."""

    tensors: int
    tables: int
    indices: int

    def bytes(self, shape: Shape, item: int) -> int:
        tokens = shape.batch * shape.tokens
        numbers = self.tensors * tokens * shape.channels + self.tables * shape.batch * shape.channels
        return numbers * item + self.indices * tokens * torch.int32.itemsize


@dataclass(frozen=True)
class Case:
    """``written``, ``lazy``: what must move with gates of that kind. None: there are no gates, both are the same."""

    run: Callable[[Way, Inputs], Outputs]
    lazy: Moved
    written: Moved | None

    def has(self, way: Way) -> bool:
        return way.plain and not way.lazy if self.written is None else True

    def moved(self, way: Way) -> Moved:
        return self.lazy if way.lazy or self.written is None else self.written


def _select01(way: Way, given: Inputs) -> Outputs:
    y, gate = way.norm(given.x, given.tables1, given.index)
    return {"y": y, **_written("gate", gate)}


def _residual_select01(way: Way, given: Inputs) -> Outputs:
    gate = given.tables1.gate if way.lazy else given.gate1
    y, residual, gate = way.residual_norm(given.attention, given.x, gate, given.tables2, given.index)
    return {"y": y, "residual": residual, **_written("gate", gate)}


def _plain(way: Way, given: Inputs) -> Outputs:
    return {"y": way.norm(given.x, given.tables1, None)[0]}


def _residual_plain(way: Way, given: Inputs) -> Outputs:
    y, residual, _ = way.residual_norm(given.attention, given.x, given.tables1.gate, given.tables2, None)
    return {"y": y, "residual": residual}


def _closing(way: Way, given: Inputs) -> Outputs:
    gate = given.tables2.gate if way.lazy else given.gate2
    return {"residual": way.closing(given.mlp, given.x, gate, given.index)}


def _block(way: Way, given: Inputs) -> Outputs:
    y1, gate1 = way.norm(given.x, given.tables1, given.index)
    y2, residual, gate2 = way.residual_norm(given.attention, given.x, gate1, given.tables2, given.index)
    closed = way.closing(given.mlp, residual, gate2, given.index)
    gates = {**_written("gate1", gate1), **_written("gate2", gate2)}
    return {"y1": y1, "y2": y2, "residual1": residual, "residual2": closed, **gates}


def _written(name: str, gate: Gate) -> Outputs:
    return {name: gate} if isinstance(gate, Tensor) else {}


CASES = {
    "select01": Case(_select01, Moved(2, 4, 1), Moved(3, 6, 1)),
    "residual_select01": Case(_residual_select01, Moved(4, 6, 1), Moved(6, 6, 1)),
    "plain": Case(_plain, Moved(2, 2, 0), None),
    "residual_plain": Case(_residual_plain, Moved(4, 3, 0), None),
    "closing": Case(_closing, Moved(3, 2, 1), Moved(4, 0, 0)),
    "block": Case(_block, Moved(9, 12, 3), Moved(13, 12, 2)),
}
