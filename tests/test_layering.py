"""A module imports only what stands below it (the levels of the design), and a few packages stay in their place."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A name stands for the module and for everything below it that has no entry of its own.
LEVELS = {
    "copd_engine.config.base": -1,
    "copd_engine.config.model": -0.9,
    "copd_engine.config.branch": -0.9,
    "copd_engine.config.rollout": -0.9,
    "copd_engine.config.training": -0.9,
    "copd_engine.config.distillation": -0.9,
    "copd_engine.config.schedule": -0.9,
    "copd_engine.config.merge": -0.9,
    "copd_engine.config.watch": -0.9,
    "copd_engine.config.run": -0.8,
    "copd_engine.config.load": -0.7,
    "copd_engine.config": 0,
    "copd_engine.gpu_meter": 0,
    "copd_engine.child_process": 0,
    "copd_engine.metrics": 0.1,
    "copd_engine.media": 0.5,
    "copd_engine.video_file": 0.4,
    "copd_engine.verifiers": 1,
    "copd_engine.rewards": 2,
    "copd_engine.partition": 0,
    "copd_engine.micro_batches": 1,
    "copd_engine.length_limit": 1,
    "copd_engine.packing": 1,
    "copd_engine.objectives": 1,
    "copd_engine.batch_loss": 1.5,
    "copd_engine.update_totals": 1.5,
    "copd_engine.dynamic_sampling": 3,
    "copd_engine.merge": 1,
    "copd_engine.merge.streaming": 1.5,
    "copd_engine.merge.search": 3.7,
    "copd_engine.merge.command": 6,
    "copd_engine.master_weights": 1,
    "copd_engine.offload": 1.5,
    "copd_engine.models": 1,
    "copd_engine.testbed.tasks": 1,
    "copd_engine.data": 2,
    "copd_engine.prompts": 3,
    "copd_engine.validation": 3,
    "copd_engine.data_check": 3.5,
    "copd_engine.testbed.model": 2,
    "copd_engine.rollout": 2,
    "copd_engine.branch": 2,
    "copd_engine.diagnostics": 3,
    "copd_engine.weight_sync": 3,
    "copd_engine.run_folder": 3,
    "copd_engine.checkpoint": 3,
    "copd_engine.algorithms": 3,
    "copd_engine.evaluate": 3.2,
    "copd_engine.evaluation.scores": 0,
    "copd_engine.evaluation.results": 0.1,
    "copd_engine.evaluation.table": 0.2,
    "copd_engine.evaluation.sources": 3.7,
    "copd_engine.evaluation.samples": 3.8,
    "copd_engine.evaluation.run": 5.6,
    "copd_engine.evaluation.compare": 5.7,
    "copd_engine.result": 3.5,
    "copd_engine.samples": 3.4,
    "copd_engine.flops": 1.5,
    "copd_engine.rollout_stats": 3.4,
    "copd_engine.finished_run": 3.5,
    "copd_engine.experts": 3.6,
    "copd_engine.flops_goal": 3.6,
    "copd_engine.step": 3.5,
    "copd_engine.resolve": 3.5,
    "copd_engine.inputs": 3.6,
    "copd_engine.plan_estimates": 2,
    "copd_engine.plan_moves": 2,
    "copd_engine.plan_items": 3.5,
    "copd_engine.plan": 3.6,
    "copd_engine.plan_changes": 3.7,
    "copd_engine.plan_text": 3.8,
    "copd_engine.held_out": 3.8,
    "copd_engine.model_rows": 3.9,
    "copd_engine.measurements": 3.9,
    "copd_engine.progress": 3.9,
    "copd_engine.trainer": 4,
    "copd_engine.distributed": 4,
    "copd_engine.testbed.build": 4,
    # Inside a package too: the page stands on figures and tables, these on the run.
    "copd_engine.report.run": 5.1,
    "copd_engine.report.retention": 5.2,
    "copd_engine.report.curves": 5.2,
    "copd_engine.report.tables": 5.2,
    "copd_engine.report.figures": 5.3,
    "copd_engine.report.page": 5.4,
    "copd_engine.report": 5.5,
    "copd_engine.runs": 6,
    "copd_engine.study.defaults": 6.1,
    "copd_engine.study.statistics": 6.1,
    "copd_engine.study.config": 6.2,
    "copd_engine.study.models": 6.25,
    "copd_engine.study.plan": 6.3,
    "copd_engine.study.pilot": 6.3,
    "copd_engine.study.worker": 6.4,
    "copd_engine.study.results": 6.4,
    "copd_engine.study.run": 6.5,
    "copd_engine.study.claims": 6.5,
    "copd_engine.study.tables": 6.6,
    "copd_engine.study.figures": 6.6,
    "copd_engine.study.page": 6.7,
    "copd_engine.study": 6.8,
    "copd_engine.cli": 7,
}
# The nouns of the project: anything may import them, and they import nothing of ours. A package of which only the parts
# have levels is as low, because importing a part imports it.
BELOW_ALL = {
    "copd_engine",
    "copd_engine.__main__",
    "copd_engine.types",
    "copd_engine.testbed",
    "copd_engine.evaluation",
}
# Where an outside package may be imported at all.
HOMES = {
    "transformers": ("copd_engine.models", "copd_engine.testbed"),
    "sglang": ("copd_engine.rollout.sglang",),
    "ray": ("copd_engine.distributed",),
    "triton": ("copd_kernels.gpu",),
}
KERNEL_PACKAGES = {"torch", "triton"}


def python_modules(folder: Path, package: str) -> dict[str, Path]:
    """Module name -> file of the package ``package`` that lies in ``folder``."""
    modules = {}
    for path in sorted((folder / package).rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(tree: ast.AST, module: str, is_package: bool, known: set[str]) -> Iterator[str]:
    """Names of the modules that ``tree`` imports, also inside functions; what only a type checker reads is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            for statement in node.orelse:
                yield from imports(ast.Module([statement], []), module, is_package, known)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = module.split(".")
                base = parts[: len(parts) - node.level + (1 if is_package else 0)]
                source = ".".join([*base, source] if source else base)
            for alias in node.names:
                # `from package import x` imports a module if there is one of that name.
                member = f"{source}.{alias.name}"
                yield member if member in known else source
        yield from imports(node, module, is_package, known)


def entry_of(module: str) -> str | None:
    """The entry of LEVELS that ``module`` falls under."""
    while module and module not in LEVELS:
        module = module.rpartition(".")[0]
    return module or None


def violations(modules: dict[str, Path]) -> list[str]:
    """One line for each import that breaks a rule."""
    known = set(modules)
    found = []
    for module, path in modules.items():
        entry = entry_of(module)
        if module.startswith("copd_engine") and entry is None and module not in BELOW_ALL:
            found.append(f"{module} has no level: place it in LEVELS of tests/test_layering.py")
            continue
        tree = ast.parse(path.read_text(), str(path))
        for name in sorted(set(imports(tree, module, path.name == "__init__.py", known))):
            outside = name.partition(".")[0]
            homes = HOMES.get(outside)
            if homes and not module.startswith(homes):
                found.append(f"{module} imports {name}, which belongs in {' or '.join(homes)}")
            if module.startswith("copd_kernels"):
                if outside not in {"copd_kernels", *KERNEL_PACKAGES, *sys.stdlib_module_names}:
                    found.append(f"{module} imports {name}: copd_kernels imports torch alone")
                continue
            if outside != "copd_engine" or name in BELOW_ALL:
                continue
            target = entry_of(name)
            if target is None:
                found.append(f"{module} imports {name}, which is no module of ours")
            elif entry is None:
                found.append(f"{module} imports {name}, but everything may import {module}: it imports nothing of ours")
            elif target != entry and LEVELS[target] >= LEVELS[entry]:
                found.append(f"{module} (level {LEVELS[entry]}) imports {name} (level {LEVELS[target]})")
    return found


def test_modules_import_only_lower_levels() -> None:
    modules = python_modules(ROOT, "copd_engine") | python_modules(ROOT / "kernels", "copd_kernels")
    assert {"copd_engine.types", "copd_kernels.reference"} <= set(modules)
    assert not (lines := violations(modules)), "\n".join(lines)


def test_kernels_folder_is_no_package() -> None:
    # `import kernels` must stay Hugging Face's.
    assert not (ROOT / "kernels" / "__init__.py").exists()


CASES = {
    "upward": (
        "copd_engine/packing.py",
        "from copd_engine.trainer import train",
        "level 1) imports copd_engine.trainer",
    ),
    "sideways": ("copd_engine/branch.py", "import copd_engine.data", "level 2) imports copd_engine.data"),
    "inside a function": (
        "copd_engine/data.py",
        "def f():\n    from copd_engine import cli",
        "imports copd_engine.cli",
    ),
    "relative": ("copd_engine/data.py", "from . import branch", "imports copd_engine.branch"),
    "relative in a package": ("copd_engine/models/__init__.py", "from ..branch import x", "imports copd_engine.branch"),
    "else of TYPE_CHECKING": (
        "copd_engine/data.py",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import copd_engine.branch",
        "imports copd_engine.branch",
    ),
    "the nouns": ("copd_engine/types.py", "from copd_engine.config import x", "imports nothing of ours"),
    "unplaced": ("copd_engine/extra.py", "", "copd_engine.extra has no level"),
    "transformers": ("copd_engine/trainer.py", "import transformers", "belongs in copd_engine.models"),
    "sglang": ("copd_engine/rollout/embedded.py", "from sglang.srt import x", "belongs in copd_engine.rollout.sglang"),
    "ray": ("copd_engine/trainer.py", "def f():\n    import ray", "belongs in copd_engine.distributed"),
    "triton": ("copd_kernels/linear.py", "import triton.language as tl", "belongs in copd_kernels.gpu"),
    "kernels need torch alone": ("copd_kernels/linear.py", "import numpy", "copd_kernels imports torch alone"),
    "kernels know no engine": ("copd_kernels/linear.py", "import copd_engine", "copd_kernels imports torch alone"),
}


def _tree(tmp_path: Path, file: str, source: str) -> dict[str, Path]:
    names = ["types", "config", "data", "packing", "branch", "trainer", "cli"]
    for path in [*(f"copd_engine/{name}.py" for name in names), "copd_engine/__init__.py", "copd_kernels/__init__.py"]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(source)
    return python_modules(tmp_path, "copd_engine") | python_modules(tmp_path, "copd_kernels")


@pytest.mark.parametrize("case", CASES)
def test_broken_rule_is_found(case: str, tmp_path: Path) -> None:
    file, source, expected = CASES[case]
    lines = violations(_tree(tmp_path, file, source))
    assert len(lines) == 1, lines
    assert expected in lines[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("copd_engine/branch.py", "from copd_engine import config, packing, types"),
        ("copd_engine/config.py", "from copd_engine.types import UserError"),
        ("copd_engine/data.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import copd_engine.trainer"),
        ("copd_engine/models/qwen.py", "import transformers\nfrom copd_engine.models import other"),
        ("copd_engine/rollout/sglang_engine.py", "import sglang"),
        ("copd_kernels/gpu/lse.py", "import triton\nimport torch\nimport math\nfrom copd_kernels import x"),
    ],
)
def test_allowed_import_passes(file: str, source: str, tmp_path: Path) -> None:
    assert violations(_tree(tmp_path, file, source)) == []
