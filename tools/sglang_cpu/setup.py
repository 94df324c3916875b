from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPth(build_py):
    """Puts the .pth file beside the modules, so that every interpreter of the environment loads the hook."""

    def run(self) -> None:
        super().run()
        Path(self.build_lib, "sglang_cpu_hook.pth").write_text("import sglang_cpu_hook\n")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, "sglang_cpu_hook.pth"))]


setup(
    name="copd-sglang-cpu",
    version="0.1",
    description="Stand-ins with which the real sglang runs on a machine without a GPU; for tests only",
    py_modules=["sgl_kernel", "sglang_cpu_hook"],
    cmdclass={"build_py": BuildWithPth},
)
