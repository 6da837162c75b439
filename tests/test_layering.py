"""Who may import whom, held by reading the imports; and what may stand nowhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "paravae"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each part may import itself and what stands before it. Longest prefix first when a module is looked up.
LAYERS = (
    ("paravae.files", "paravae.configs", "paravae.vae.pixels", "paravae.vae.posterior"),
    ("paravae.vae.plan",),
    ("paravae.layers",),
    ("paravae.vae.presence", "paravae.vae.rows"),
    ("paravae.vae.comm", "paravae.vae.blend", "paravae.vae.memory", "paravae.vae.checks", "paravae.vae.cost"),
    ("paravae.vae.models",),
    ("paravae.vae.engines",),
    ("paravae.vae.choice",),
    ("paravae.vae.share",),
    ("paravae.vae.work",),
    ("paravae.vae.parallel",),
    ("paravae.vae.autoencoders",),
    ("paravae.integrations",),
    ("paravae.launch",),
    ("paravae.__main__",),
)
PARTS = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it: ``from a import b`` counts as a and as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def uses(path: Path, *modules: str) -> set[str]:
    return {name for name in imports_of(path) for module in modules if name == module or name.startswith(f"{module}.")}


def attributes_of(path: Path) -> set[str]:
    """Dotted names and bare names that a file mentions: torch.distributed, dist.all_gather_object, pickle."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute | ast.Name)}


def part_of(module: str) -> str | None:
    return max((part for part in PARTS if module == part or module.startswith(f"{part}.")), key=len, default=None)


ids = [module_name(path) for path in FILES]


def test_reads_something() -> None:
    assert len(FILES) > 20
    assert "torch.distributed" in imports_of(PACKAGE / "vae/comm.py")
    assert {"paravae.vae.plan.Span", "torch"} <= imports_of(PACKAGE / "vae/blend.py")


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_run_one_way(path: Path) -> None:
    """configs <- plan <- layers <- comm, blend <- models <- engines <- parallel <- integrations <- launch."""
    module = module_name(path)
    if module == "paravae":  # the public names
        return
    own = part_of(module)
    if own is None:
        assert module == "paravae.vae", f"{module} stands in no layer: name it in this test"
        assert not uses(path, "paravae")
        return
    for name in uses(path, "paravae"):
        part = part_of(name)
        if part is None:  # a folder on the way to a module; the public names are for those who use the package
            assert name == "paravae.vae" or own in LAYERS[-2], f"{module} imports {name}"
        else:
            assert part == own or PARTS[part] < PARTS[own], f"{module} imports {name}: {part} is not before {own}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_distributed_only_in_comm_and_launch(path: Path) -> None:
    allowed = path == PACKAGE / "vae/comm.py" or PACKAGE / "launch" in path.parents
    if not allowed:
        assert not uses(path, "torch.distributed")
        types = {"torch.distributed", "torch.distributed.ProcessGroup"}  # a type in a signature calls nothing
        mentioned = {name for name in attributes_of(path) if name.startswith("torch.distributed")}
        takes_groups = path == PACKAGE / "vae/parallel.py" or PACKAGE / "integrations" in path.parents
        assert mentioned <= (types if takes_groups else set())


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_triton_only_in_layers_and_tensorrt_by_its_flavour_only(path: Path) -> None:
    if PACKAGE / "layers" not in path.parents:
        assert not uses(path, "triton")
    assert not uses(path, "tensorrt", "tensorrt_rtx", "tensorrt_bindings", "tensorrt_rtx_bindings", "torch_tensorrt")
    if path != PACKAGE / "vae/engines/trt/flavour.py":  # which imports it by a name that is looked up
        assert "tensorrt_rtx_bindings" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_other_runtimes_in_their_integration_only(path: Path) -> None:
    """SGLang in the files that bear its name, diffusers in the integrations and the benchmark that times it; nothing
    below imports an integration."""
    if PACKAGE / "integrations" not in path.parents:
        assert not uses(path, "sglang", "transformers", "accelerate")
        assert path == PACKAGE / "launch/bench_peers.py" or not uses(path, "diffusers")
        assert PACKAGE / "launch" in path.parents or not uses(path, "paravae.integrations")
    elif not path.name.startswith("sglang"):
        assert not uses(path, "sglang")


def test_parts_that_know_nothing_of_each_other() -> None:
    """Planning knows no torch; models and engines know nothing of ranks; the parallel code knows no engine."""
    assert not uses(PACKAGE / "vae/plan.py", "torch", "numpy", "paravae")
    assert not uses(PACKAGE / "vae/engines/trt/shapes.py", "torch", "numpy")
    for path in PACKAGE.glob("configs/*.py"):
        assert not uses(path, "torch", "paravae.vae", "paravae.launch", "paravae.layers")
    ranks = ("paravae.vae.comm", "paravae.vae.parallel")
    for path in PACKAGE.glob("vae/models/*.py"):
        assert not uses(path, *ranks, "paravae.vae.engines")
    for path in PACKAGE.glob("vae/engines/**/*.py"):
        assert not uses(path, *ranks)
    engine_parts = uses(PACKAGE / "vae/parallel.py", "paravae.vae.engines", "paravae.vae.models")
    assert engine_parts <= {"paravae.vae.engines.base", "paravae.vae.engines.base.Engine"}
    for path in PACKAGE.glob("vae/**/*.py"):
        assert not uses(path, "paravae.launch")


def test_nothing_is_pickled_and_no_rank_waits_for_a_number() -> None:
    """comm.py's data path: no object collectives, no .item(), no copy to the host."""
    path = PACKAGE / "vae/comm.py"
    last_names = {name.split(".")[-1] for name in attributes_of(path)}
    assert not {name for name in last_names if name.endswith(("_object", "_object_list")) or name == "item"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "gather_into"]
    assert len(bodies) == 1
    called = {ast.unparse(node.func).split(".")[-1] for node in ast.walk(bodies[0]) if isinstance(node, ast.Call)}
    assert "_all_gather_single" in called
    assert not called & {"item", "tolist", "cpu", "numpy", "int", "float", "bool", "synchronize", "to", "_exchange"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nothing_that_can_execute_code_is_loaded(path: Path) -> None:
    assert not uses(path, "pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
    names = attributes_of(path)
    assert not names & {"torch.load", "torch.jit.load", "torch.hub.load", "eval", "exec", "numpy.load", "np.load"}
