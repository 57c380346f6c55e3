"""Import rules between packages, and cheap imports."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dsr_jax"

LEAVES = {
    "core": set(),
    "parallel": {"core"},
    "models": {"core", "parallel.axes"},
    "reports": {"core", "telemetry"},
    "registers": {"core", "parallel", "models", "reports"},
    "spaces": {"core", "models", "registers"},
    "diffusion": {"core"},
    "data": {"core"},
    "telemetry": {"core", "parallel"},
    "sampling": {"core", "parallel", "diffusion"},
    "training": {"core", "parallel", "diffusion", "data", "telemetry"},
    "evaluation": {"core", "parallel", "models", "telemetry"},
    "convert": {"core", "models"},
    # Sizes and config keys of the networks are defined beside them, and the published register
    # neurons beside their search.
    "config": {"core", "models.variants", "models.registry", "registers.neurons"},
}
ALLOWED = {
    **LEAVES,
    "build": set(LEAVES),
    "planning": {"core", "parallel", "telemetry", "config", "build", "reports"},
    "runs": {*LEAVES, "build"},
}
COMMANDS = {
    *("train", "train_decoder", "sample", "evaluate", "evaluate_reconstruction"),
    *("encode", "compile", "export", "evaluate_prompts", "report"),
}
ONLY_IN = {"orbax": "training/checkpoint", "grain": "data/", "torch": "convert/"}
LAZY = {
    "torch",
    "matplotlib",
    "wandb",
    "tensorboardX",
    "tensorflow_datasets",
    "transformers",
    "huggingface_hub",
    "skimage",
    "sklearn",
}


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """Lists (module, inside a function) of all imports; names imported from a package count."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                found.extend((f"{module}.{alias.name}", inside) for alias in child.names)
            # What stands under `if TYPE_CHECKING` is never run.
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            deferred = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or typing_only
            visit(child, inside or deferred)

    visit(tree, False)
    return found


def violations(relative: str, source: str) -> list[str]:
    """Lists the import rules that a file of the package breaks."""
    package = relative.split("/")[0].removesuffix(".py")
    problems = []
    for module, inside in imports(ast.parse(source)):
        top = module.split(".")[0]
        if top in ONLY_IN and not relative.startswith(ONLY_IN[top]):
            problems.append(f"{relative}: {top} belongs in {ONLY_IN[top]}")
        if top in LAZY and not inside:
            problems.append(f"{relative}: {top} must be imported inside a function")
        if top != "dsr_jax":
            continue
        ours = module.removeprefix("dsr_jax.")
        target = ours.split(".")[0]
        if target in COMMANDS:
            problems.append(f"{relative}: imports the command {target}")
        elif package in ALLOWED and target != package:
            if not any(ours == name or ours.startswith(name + ".") for name in ALLOWED[package]):
                problems.append(f"{relative}: {package} may not import {ours}")
    return problems


def test_every_file_keeps_the_rules() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    packages = {path.relative_to(PACKAGE).parts[0] for path in files if path.parent != PACKAGE}
    assert packages <= set(ALLOWED), "a new package needs its line in ALLOWED"
    problems = [
        problem
        for path in files
        for problem in violations(path.relative_to(PACKAGE).as_posix(), path.read_text())
    ]
    assert not problems, "\n".join(problems)
    modules = {path.stem for path in files if path.parent == PACKAGE}
    assert modules == {*COMMANDS, "__init__"}, "only commands stand beside the packages"


def test_there_is_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    names = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    }
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        found = {module.removeprefix("dsr_jax.") for module, _ in imports(tree)}
        # An imported name is a module of its own, or stands in the module before it.
        targets = {m if m in names else m.rpartition(".")[0] for m in found}
        graph[name.removesuffix(".__init__")] = (targets & names) - {name}
    TopologicalSorter(graph).prepare()


def test_configs_import_the_config_module_and_sizes_only() -> None:
    sizes = [
        f"dsr_jax.models.{name}"
        for name in ("variants", "registry", "dit", "dit_dh", "sit", "jit", "language")
    ]
    for path in (ROOT / "configs").glob("*.py"):
        for module, _ in imports(ast.parse(path.read_text())):
            assert module.startswith(("ml_collections", "dsr_jax.config", *sizes)), module


@pytest.mark.parametrize(
    ("relative", "source", "problem"),
    [
        ("models/a.py", "from dsr_jax.parallel.mesh import make_mesh", "models may not import"),
        ("diffusion/a.py", "import dsr_jax.models.dit", "diffusion may not import models"),
        ("training/a.py", "import orbax.checkpoint as ocp", "orbax belongs"),
        ("convert/a.py", "import torch", "inside a function"),
        ("models/a.py", "def f():\n    import torch", "torch belongs"),
        ("sample.py", "from dsr_jax import train", "command train"),
        ("config/a.py", "from dsr_jax import data", "config may not import data"),
    ],
)
def test_the_check_finds_violations(relative: str, source: str, problem: str) -> None:
    assert any(problem in found for found in violations(relative, source))


def test_importing_the_package_loads_no_other_framework() -> None:
    program = (
        "import sys, dsr_jax, dsr_jax.build, dsr_jax.train\n"
        "heavy = {'torch', 'tensorflow', 'matplotlib', 'transformers', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
