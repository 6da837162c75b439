"""What ranks say to each other before and between collectives: rows of one size, a kind, a number and a few words."""

from __future__ import annotations

import struct
from dataclasses import dataclass

ROW_BYTES = 1024
FINE, INPUT_ERROR, FAILURE, GONE = 0, 1, 2, 3  # the last: the rank that is ``number``, as this one has found
_HEAD = struct.Struct("!Bq")  # kind, number; then the message in UTF-8, cut to fit


@dataclass(frozen=True)
class Row:
    """What one rank says."""

    kind: int
    number: int
    message: str

    @staticmethod
    def of(message: str, number: int, failure: Exception | None) -> Row:
        """All is well, or ``failure`` came in the way."""
        if failure is None:
            return Row(FINE, number, message)
        kind = INPUT_ERROR if isinstance(failure, ValueError) else FAILURE
        return Row(kind, number, f"{type(failure).__name__}: {failure}")

    def packed(self) -> bytes:
        """As it travels."""
        row = _HEAD.pack(self.kind, self.number) + self.message.encode()
        return row[:ROW_BYTES].ljust(ROW_BYTES, b"\0")

    @staticmethod
    def unpacked(row: bytes) -> Row:
        """What came."""
        kind, number = _HEAD.unpack_from(row)
        return Row(kind, number, row[_HEAD.size :].rstrip(b"\0").decode(errors="replace"))
