"""What an encode gives: a diagonal Gaussian for each latent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """Mean and log-variance of the latents, [B, z_dim, T, h, w] each."""

    mean: Tensor
    logvar: Tensor

    @staticmethod
    def from_moments(moments: Tensor) -> Posterior:
        """From [B, 2 z_dim, T, h, w]: the means, then the log-variances, clamped to [-30, 20] as diffusers does."""
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    @property
    def moments(self) -> Tensor:
        """[B, 2 z_dim, T, h, w]: the means, then the log-variances."""
        return torch.cat([self.mean, self.logvar], dim=1)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The likeliest latents: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Latents drawn at random; the noise is drawn on the generator's device, so a seed gives one result."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)
