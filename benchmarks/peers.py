"""Peers that are no flag of ``paravae bench``, because setting them up takes more than installing a package."""

from __future__ import annotations

from pathlib import Path

import torch

from paravae.launch.bench import OtherPeer
from paravae.launch.bench_model import Model
from paravae.launch.bench_peers import Peer, refusing


def sglang_from(folder: Path) -> OtherPeer:
    """SGLang's class for Qwen-Image, bfloat16 weights without autocast, as its server runs it."""

    def build(model: Model, dtype: torch.dtype, device: torch.device) -> Peer:
        from benchmarks import sglang_peer

        base_dim = model.config.arch_config.base_dim
        try:
            peer = sglang_peer.build(model.state, dtype, device, folder=folder, base_dim=base_dim)
        except sglang_peer.PeerUnavailable as reason:
            raise ValueError(f"--sglang {folder}: {reason}") from reason
        return Peer("sglang", peer.what_ran, peer.decode, peer.encode)

    return build


def shared_sglang(folder: Path, mode: str, *, plugin: bool = False) -> OtherPeer:
    """The same, its decodes shared by the ranks as SGLang's ``parallel_decode_mode`` says. ``plugin``: paravae's class
    for SGLang instead, made and called alike."""

    def build(model: Model, dtype: torch.dtype, device: torch.device) -> Peer:
        from benchmarks import sglang_peer

        how = {"folder": folder, "base_dim": model.config.arch_config.base_dim, "parallel": mode, "plugin": plugin}
        peer = sglang_peer.build(model.state, dtype, device, **how)
        return Peer(f"{'paravae-in-' * plugin}sglang-{mode}", peer.what_ran, peer.decode, peer.encode)

    return build


def distvae(mode: str) -> OtherPeer:
    """diffusers' class, its decoder shared by DistVAE."""

    def build(model: Model, dtype: torch.dtype, device: torch.device) -> Peer:
        from benchmarks import distvae_peer

        return distvae_peer.build(model, dtype, device, mode)

    return build


def or_reason(name: str, build: OtherPeer) -> OtherPeer:
    """The peer, or where it cannot be built one that says why at every call: the others go on without it."""

    def attempt(model: Model, dtype: torch.dtype, device: torch.device) -> Peer:
        try:
            return build(model, dtype, device)
        except Exception as error:  # whatever it is of another's code, it is a result
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        refuse = refusing(f"not built: {reason}")
        return Peer(name, f"not built: {reason}", refuse, refuse)

    return attempt
