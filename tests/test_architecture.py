"""The rules of the architecture, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "overlap"
FILES = sorted(ROOT.rglob("*.py"))
DECIDERS = sorted(
    [
        *(ROOT / "schedule").glob("*.py"),
        *(ROOT / "cache").glob("*.py"),
        *(ROOT / "microbatch" / f"{name}.py" for name in ("cost", "policy")),
        ROOT / "config.py",
        ROOT / "resolve.py",
    ]
)
PUBLIC_EDGE = [ROOT / "errors.py", ROOT / "messages.py", ROOT / "front.py", ROOT / "engine.py", ROOT / "loop.py"]
HOT_PATH = [
    *(ROOT / f"{name}.py" for name in ("runner", "lane_runner", "flight")),
    *(ROOT / "graphs" / f"{name}.py" for name in ("eager", "lane", "pieces", "driver", "capture")),
    *(ROOT / "schedule").glob("*.py"),
    *(ROOT / "state").glob("*.py"),
    *(ROOT / "sample").glob("*.py"),
    *(ROOT / "ops").glob("*.py"),
    *(ROOT / "spec" / f"{name}.py" for name in ("step", "runs", "inputs", "rows", "accept", "control", "chain")),
    *(ROOT / "spec" / f"{name}.py" for name in ("places", "pair", "eagle", "ngram", "drafter")),
    ROOT / "models" / "llama.py",
    ROOT / "models" / "program.py",
]
WAITS = {"item", "cpu", "synchronize", "tolist", "nonzero", "result", "sleep", "wait", "join", "acquire"}
HOST_ONLY = {  # (file, function): why nothing there waits for a device
    ("lane_runner.py", "usable"): "looks at the device after a failure",
    ("ops/rope.py", "_write"): "the CPU's own path",
    ("ops/attention.py", "_plan_decode"): "behind a test for CUDA",
    ("sample/philox.py", "gumbel"): "behind a test for CUDA",
    ("state/inputs.py", "_mixed_inputs"): "the CPU's own path",
    ("state/strips.py", "_build"): "the CPU's own path",
}
SLEEPERS = {  # (file, function) of the streams: who sleeps until the device is there
    ("streams/cuda.py", "_wait"): "the waiter's thread",
    ("streams/naps.py", "sleep_until_passed"): "what that does",
    ("streams/events.py", "synchronize"): "the call for it",
    ("streams/cuda.py", "close"): "ends it all",
}
LAYERS = [  # an import goes to the same line or further down
    {"serve", "cli", "cli_options", "conversation", "__main__"},
    {"engine", "calibrate", "__init__", "testing"},
    {"core", "assemble"},
    {"front"},
    {"loop", "runner", "lane_runner", "flight"},
    {"schedule", "graphs", "streams", "observe", "microbatch"},
    {"state", "sample", "models", "text", "cache", "config", "resolve", "environment", "grammar"},
    {"ops"},
]
VALUES = {
    "errors", "messages", "cache", "schedule.plan", "schedule.shaping", "models.config", "streams.stream", "config",
    "resolve",
}  # fmt: skip


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return (module, at the top level of the file and at run time) for each import of a file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    found = []
    for node in ast.walk(tree):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        parent, top = getattr(node, "parent", None), True
        while parent is not None:
            top = top and not isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef))
            if isinstance(parent, ast.If) and "TYPE_CHECKING" in ast.unparse(parent.test):
                top = False
            parent = getattr(parent, "parent", None)
        found += [(name, top) for name in names]
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DECIDERS, ids=relative)
def test_a_decider_imports_no_torch(path: Path) -> None:
    assert not [name for name, _ in imports(path) if name.split(".")[0] == "torch"]


@pytest.mark.parametrize("path", [*DECIDERS, *PUBLIC_EDGE], ids=relative)
def test_importing_a_decider_or_the_public_edge_loads_no_torch(path: Path) -> None:
    module = "overlap." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    name = module.removesuffix(".__init__")
    code = f"import sys, importlib; importlib.import_module({name!r}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT.parent)}


@pytest.mark.parametrize("path", HOT_PATH, ids=relative)
def test_the_hot_path_never_makes_the_host_wait_for_the_device(path: Path) -> None:
    tree = ast.parse(path.read_text())
    decider = path in DECIDERS  # numpy there: `tolist` and `nonzero` wait for nobody
    for function in [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]:
        if (relative(path), function.name) in HOST_ONLY:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITS:
                on_host = decider or ast.unparse(node.func.value).startswith(("np.", "numpy."))
                assert on_host, f"{relative(path)}:{node.lineno} calls .{node.func.attr}()"


def test_of_the_streams_only_the_waiters_thread_and_closing_sleep_until_the_device_is_there() -> None:
    sleepers = set()
    for path in (ROOT / "streams").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            named = {ast.unparse(node) for node in ast.walk(function) if isinstance(node, (ast.Attribute, ast.Name))}
            ends = {name.rpartition(".")[2] for name in named}
            if "time.sleep" in named or ends & {"synchronize", "cuEventSynchronize", "sleep_until_passed"}:
                sleepers.add((relative(path), function.name))
    assert sleepers == set(SLEEPERS)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    def layer(module: str) -> int | None:
        first = module.split(".")[0]
        return next((i for i, names in enumerate(LAYERS) if first in names), None)

    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name, _ in imports(path):
        if not name.startswith("overlap."):
            continue
        target = name.removeprefix("overlap.")
        if any(target == value or target.startswith(value + ".") for value in VALUES):
            continue
        mine, theirs = layer(own), layer(target)
        if mine is None or theirs is None:
            continue
        assert theirs >= mine, f"{own} imports {target}, which is above it"


def test_no_module_is_part_of_an_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    dotted = {path: ".".join(("overlap", *path.relative_to(ROOT).with_suffix("").parts)) for path in FILES}
    names = {name.removesuffix(".__init__"): path for path, name in dotted.items()}
    for name, path in names.items():
        graph[name] = {target for target, top in imports(path) if top and target in names and target != name}
    seen: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail, name))
        if name in seen:
            return
        for target in graph[name]:
            visit(target, (*trail, name))
        seen[name] = 1

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_the_environment_is_read_in_one_file_and_nothing_global_is_set(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    if path.name != "environment.py":
        assert "os.environ" not in text
        assert "getenv" not in text
    for setter in (  # OpenMP's own omp_set_num_threads is a setting of the calling thread, and no other's
        "set_num_threads", "set_default_dtype", "set_default_device", "manual_seed_all", "set_event_loop_policy",
        "signal.signal", "set_start_method", "random.seed", "uvloop.install",
    ):  # fmt: skip
        assert setter not in text.replace("omp_set_num_threads", ""), f"{relative(path)} calls {setter}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_is_unpickled_and_no_exception_is_swallowed_whole(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not [name for name, _ in imports(path) if name.split(".")[0] in ("pickle", "cloudpickle", "dill")]
    assert "torch.load(" not in path.read_text()
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and (
            node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        ):
            assert not all(isinstance(line, (ast.Pass, ast.Continue)) for line in node.body), f"{path}:{node.lineno}"
