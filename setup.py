"""Builds the C kernels of the CPU backend, where there is a compiler; pyproject.toml has everything else.

The library is plain C, loaded with ctypes: it needs neither Python's nor torch's headers, and one build serves all
versions of both. Without a compiler, or with one that is not GCC or Clang, installation goes on without it.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/torch-ext/int8_paged_attention/cpu_src")
# Float operations are neither fused nor reordered: every backend must produce the same int8 values and scales.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


class BuildCpuKernels(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name, as none is in the library."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            self.warn(f"the CPU kernels need GCC or Clang, not {self.compiler.compiler_type}: left out")
            return
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "hf_int8_paged.kernels._int8_paged_cpu",
            sources=sorted(str(path) for path in SOURCES.glob("*.c")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            extra_compile_args=[*FLAGS, "-Wno-psabi"],
            libraries=["m"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildCpuKernels},
)
