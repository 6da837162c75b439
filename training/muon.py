"""Muon: momentum made orthogonal, for weights that act as matrices (Jordan et al. 2024).

Source: kellerjordan.github.io/posts/muon. For this small network it reaches a given loss in far fewer steps
than Adam alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# Newton-Schulz coefficients of the Muon post: five steps bring singular values near one.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the nearest semi-orthogonal matrices to a batch [N, rows, cols]."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for convolution weights, each flattened to [out, in * taps]; weights of one shape go as one batch."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for shape, weights in by_shape.items():
                gradients = torch.stack([weight.grad for weight in weights if weight.grad is not None])
                state = self.state[weights[0]]
                momentum = state.setdefault("momentum", torch.zeros_like(gradients))
                momentum.lerp_(gradients, 1 - group["momentum"])
                nesterov = gradients.lerp(momentum, group["momentum"]).flatten(2)
                update = orthogonalized(nesterov) * math.sqrt(max(1, nesterov.shape[1] / nesterov.shape[2]))
                for weight, change in zip(weights, update.unflatten(2, shape[1:]), strict=True):
                    weight.sub_(change, alpha=group["lr"])
