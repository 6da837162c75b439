"""torchrun beyond one life on one host: a job that starts again after a kill, and two agents that make one world."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_bench import Bench

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# Rank 1 of the first life is killed in the middle of a decode. Both programs decode what a lone rank decodes too.
KILL = """
import os, signal, sys
from paravae.vae.share import Sharer

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    Sharer.gather = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""
COMMAND = f"""{KILL}
from paravae.launch.cli import main

sys.exit(main(sys.argv[1:]))
"""
SCRIPT = f"""{KILL}
import torch.distributed as dist
from tests.builders import max_error, noise, small_vae

dist.init_process_group("gloo")
vae, latents = small_vae(use_parallel_decode=True, parallel_decode_mode="patch"), noise(1, 16, 1, 12, 9)
assert max_error(vae.decode(latents), small_vae().decode(latents)) <= 2e-5
print(vae.last_choice.how)
"""


def run_with_a_restart(program: str, ranks: int, folder: Path, *arguments: str, **environment: str) -> str:
    """``program`` names the killed rank in its first life, and ends well in its second. What it wrote to stderr."""
    (folder / "program.py").write_text(program)
    ended = subprocess.run(
        [*TORCHRUN, "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1", folder / "program.py", *arguments],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert f"rank 1 of {ranks} is gone (process " in ended.stderr
    assert f"patch, {ranks} x 1 windows on {ranks} ranks" in ended.stdout
    return ended.stderr


def test_a_command_whose_rank_was_killed_starts_again(bench: Bench) -> None:
    assert bench.decode(output="out/one.png") == 0
    said = run_with_a_restart(COMMAND, 3, bench.folder, "decode", *decode_flags(bench, "three.png"))
    assert said.count("paravae: error: ") == 1, said
    expect_same_picture(bench, "one.png", "three.png")


def test_a_script_whose_rank_was_killed_starts_again(tmp_path: Path) -> None:
    """Without this variable PyTorch 2.13 gives the second life the addresses of the first."""
    run_with_a_restart(SCRIPT, 2, tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def decode_flags(bench: Bench, output: str) -> list[str]:
    files = ["--latents", bench.path("z.safetensors"), "--output", bench.path(f"out/{output}")]
    mode = ["--vae-config.use-parallel-decode", "--vae-config.parallel-decode-mode", "patch"]
    return [*files, "--model", bench.path("model"), "--device", "cpu", *mode]


def expect_same_picture(bench: Bench, one: str, other: str) -> None:
    assert bench.written() == sorted((one, other))
    difference = abs(bench.picture(one).astype(int) - bench.picture(other).astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-4


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_agents_write_the_picture_of_one_rank(bench: Bench, rendezvous: str) -> None:
    """As on two hosts: each agent starts two ranks, and one of the four writes."""
    assert bench.decode(output="out/one.png") == 0
    port = free_port()
    meeting = {
        "static": ["--master-addr=127.0.0.1", f"--master-port={port}"],
        "c10d": ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two-agents"],
    }[rendezvous]
    decode = ["-m", "paravae", "decode", *decode_flags(bench, "four.png")]
    agents = [
        subprocess.Popen(
            [*TORCHRUN, "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2", *meeting, *decode],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    try:
        said = [agent.communicate(timeout=120) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "".join(stdout for stdout, _ in said).count("windows on 4 ranks") == 1, said
    assert "cannot connect" not in "".join(stderr for _, stderr in said)
    expect_same_picture(bench, "one.png", "four.png")
