"""Input that the modulation ops refuse, by name; and input that their kernel leaves to plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paravae.layers import CustomOp, FusedLayerNormScaleShift
from paravae.layers.modulate import modulate
from tests.modulation_cases import DEVICE, OPS, Call, cast, parameters, step_by_step

Spoil = Callable[[Tensor], object]

# Of x and residual [2, 3, 8], tables [2, 8], vectors [8] and the index [2, 3], all float32 but the index.
OF_ANY: dict[str, Spoil] = {
    "a dimension more": lambda value: value[None, None],
    "a dimension less": lambda value: value[0],
}
NOTHING: dict[str, Spoil] = {
    "nothing": lambda value: None,
}
OF_FLOATS: dict[str, Spoil] = {
    "integers": lambda value: value.long(),
    "complex": lambda value: value.to(torch.complex64),
    "eight bits": lambda value: value.to(torch.float8_e4m3fn),
}
OF_ALL_BUT_X: dict[str, Spoil] = {
    "another device": lambda value: value.to("meta"),
    "a size more": lambda value: torch.cat([value, value[-1:]]),
    "a size less": lambda value: value[..., :-1],
}
OF_ALL_FLOATS_BUT_X: dict[str, Spoil] = {
    "another dtype": lambda value: value.half(),
    "a wider dtype": lambda value: value.double(),
    "one channel": lambda value: value[..., :1],
}
OF_RESIDUAL: dict[str, Spoil] = {"one token": lambda value: value[:, :1], "one batch": lambda value: value[:1]}
OF_TABLES: dict[str, Spoil] = {"tokens, but too few": lambda value: value[:, None].repeat(1, 2, 1)}
OF_INDEX: dict[str, Spoil] = {
    "floats": lambda value: value.float(),
    "one token": lambda value: value[:, :1],
    "tokens before batch": lambda value: value.mT,
}


def spoils_of(name: str) -> dict[str, Spoil]:
    spoils = OF_ANY | ({} if name == "x" else OF_ALL_BUT_X) | ({} if name in ("weight", "bias") else NOTHING)
    if name == "index":
        return spoils | OF_INDEX
    spoils |= OF_FLOATS | ({} if name == "x" else OF_ALL_FLOATS_BUT_X)
    if name == "residual":
        return spoils | OF_RESIDUAL
    return spoils if name in ("x", "weight", "bias") else spoils | OF_TABLES


def answer(op: type[CustomOp], way: str, arguments: dict[str, Any]) -> str:
    try:
        op(force=way)(**arguments)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("op", "name"), [pytest.param(op, name, id=f"{op.name}-{name}") for op in OPS for name in parameters(op)]
)
def test_bad_input_is_refused_by_name(op: type[CustomOp], name: str) -> None:
    arguments = Call(op=op, channels=8).arguments()
    for way in ("native", "cuda"):
        answers = {
            what: answer(op, way, arguments | {name: spoil(arguments[name])}) for what, spoil in spoils_of(name).items()
        }
        assert {what: text for what, text in answers.items() if not text.startswith(f"{name} ")} == {}


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's index is not looked at, that the host need not wait")
@pytest.mark.parametrize("value", [2, -1, 256])
def test_an_index_has_only_0_and_1(value: int) -> None:
    for op in (op for op in OPS if "index" in parameters(op)):
        arguments = Call(op=op).arguments()
        arguments["index"][1, 2] = value
        with pytest.raises(ValueError, match=f"^index has values from .*{value}.*, not only 0 and 1"):
            op()(**arguments)


def test_a_norm_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="norm is 'batch', not 'layer' or 'rms'"):
        FusedLayerNormScaleShift("batch")  # type: ignore[arg-type]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("call", "change", "reason"),
    [
        (Call(op=OPS[1], channels=16385), {}, "1 to 16384 channels, not 16385"),
        (Call(op=OPS[1], dtype=torch.float64), {}, "torch.float64"),
        (Call(op=OPS[1], dtype=torch.float16), {"scale1": torch.float32}, "differ in dtype"),
    ],
    ids=["wide", "fp64", "mixed"],
)
def test_what_the_kernel_does_not_take_is_computed_all_the_same(
    call: Call, change: dict[str, torch.dtype], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str | None] = []
    decide = modulate._reason

    def deciding(*args: Any) -> str | None:
        reasons.append(decide(*args))
        return reasons[-1]

    monkeypatch.setattr(modulate, "_reason", deciding)
    arguments = call.arguments()
    arguments |= {name: arguments[name].to(dtype) for name, dtype in change.items()}
    (found,), (truth,) = call.by("cuda", arguments), step_by_step(cast(arguments, torch.float64))
    torch.testing.assert_close(found, truth.to(call.dtype))
    assert [reason in str(said) for said in reasons] == [True]
