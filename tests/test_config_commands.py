"""Config files given to the commands, and the scripts that start from presets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paravae.launch.bench_model import plain
from paravae.launch.cli import main
from tests.command_bench import Bench, Refused, expect_one_line
from tests.config_cases import ROOT, SCRIPTS, STATED, written


def test_decode_by_a_file(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    tiles = {f"tile_sample_{what}_{side}": 32 for what in ("min", "stride") for side in ("height", "width")}
    file = written(bench.folder, json.dumps({"use_tiling": True, **tiles}), "tiles.json")
    assert bench.decode("--vae-config-file", file) == 0
    assert "tiled, 3 x 2 tiles on 1 rank" in capsys.readouterr().out
    assert bench.decode("--vae-config-file", file, "--vae-config.use-tiling", "false") == 0
    assert "single on 1 rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"use_tilling": true}', ("--vae-config-file vae.json: unknown key 'use_tilling'", "is 'use_tiling'")),
        ('{"load_decoder": false, "load_encoder": true}', ("paravae decode needs the decoder",)),
        ("{", ("--vae-config-file vae.json: is not JSON",)),
    ],
)
def test_a_wrong_file_stops_a_command(bench: Bench, refused: Refused, text: str, words: tuple[str, ...]) -> None:
    written(bench.folder, text)
    refused(lambda: bench.decode("--vae-config-file", "vae.json"), *words)


def test_bench_records_the_file(bench: Bench) -> None:
    file = written(bench.folder, '{"tile_sample_min_height": 320}')
    flags = ["--sizes", "32x32", "--what", "decode", "--dtype", "float32", "--repeats", "1", "--warmup", "1"]
    output = bench.path("out/rows.json")
    where = ["--model", bench.path("model"), "--device", "cpu", "--output", output]
    assert main(["bench", *where, *flags, "--vae-config-file", file]) == 0
    args = json.loads(Path(output).read_text())["args"]
    assert (args["vae_config.tile_sample_min_height"], args["vae_config_file"]) == (320, file)
    assert args["vae_config.trt_vae_config.warm_up"] == []


def test_what_results_are_checked_by_is_pytorch() -> None:
    assert (plain(STATED).vae_type, plain(STATED).engine) == ("pytorch", "torch")


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


OTHER_FOLDERS = """
import os, sys
from paravae.launch.cli import main

os.chdir(os.environ["RANK"])
sys.exit(main(sys.argv[1:]))
"""


def test_a_file_that_one_rank_lacks_stops_all(bench: Bench) -> None:
    """As on two hosts, of which one has the file: no rank waits for the other."""
    for rank in "01":
        (bench.folder / rank).mkdir()
    written(bench.folder / "0", '{"use_parallel_decode": true}')
    program = written(bench.folder, OTHER_FOLDERS, "program.py")
    files = ["--latents", bench.path("z.safetensors"), "--output", bench.path("out/x.png")]
    decode = ["decode", *files, "--model", bench.path("model"), "--device", "cpu", "--vae-config-file", "vae.json"]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program, *decode],
        cwd=bench.folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    expect_one_line(ended.stderr, "--vae-config-file vae.json: cannot be read: No such file")
    assert ended.stderr.count("exitcode  : 2 ") == 2, ended.stderr  # torchrun's own report of both ranks
    assert bench.written() == []


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPTS / name, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("name", "before"), [("tensorrt_1_gpu.sh", ("decode",)), ("tensorrt_n_gpus.sh", ("2", "decode"))]
)
def test_scripts_pass_flags_on(bench: Bench, name: str, before: tuple[str, ...]) -> None:
    assert bench.decode("--dtype", "float32", output="out/one.png") == 0
    files = ["--latents", bench.path("z.safetensors"), "--output", bench.path("out/x.png"), "--model"]
    place = ["--device", "cpu", "--dtype", "float32", "--vae-config.vae-type", "pytorch"]
    patch = ["--vae-config.parallel-decode-mode", "patch"]
    ended = script(name, *before, *files, bench.path("model"), *place, *patch)
    assert ended.returncode == 0, ended.stderr
    assert ("patch, 2 x 1 windows on 2 ranks" if len(before) > 1 else "single on 1 rank") in ended.stdout
    assert abs(bench.picture("one.png").astype(int) - bench.picture("x.png").astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tensorrt_1_gpu.sh", ()),
        ("tensorrt_1_gpu.sh", ("--latents", "z.safetensors")),
        ("tensorrt_n_gpus.sh", ("2",)),
        ("tensorrt_n_gpus.sh", ("decode", "--latents")),
        ("tensorrt_n_gpus.sh", ("0", "decode")),
    ],
)
def test_scripts_say_how_they_are_used(name: str, arguments: tuple[str, ...]) -> None:
    ended = script(name, *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"usage: {name} ")


def test_scripts_stop_at_a_wrong_flag() -> None:
    ended = script("tensorrt_1_gpu.sh", "decode", "--nosuch")
    assert ended.returncode == 2
    expect_one_line(ended.stderr, "--latents, --output")
