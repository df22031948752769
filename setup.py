"""Builds the C kernels of the CPU backend, where there is a compiler, and the text that a package registry shows.

The library is plain C, loaded with ctypes: it needs neither Python's nor torch's headers, and one build serves all
versions of both. Without a compiler, or with one that is not GCC or Clang, installation goes on without it.
"""

import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

#: Address of the public repository, "https://github.com/owner/name"; empty while there is none. With it registries show
#: the pictures and links of the README; without it their text, as relative links lead nowhere there.
REPOSITORY = ""
SOURCES = Path("kernels/torch-ext/int8_paged_attention/cpu/src")
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


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3, no ABI of Python's, this platform: the library asks for nothing but the platform."""
        return ("py3", "none", super().get_tag()[2])


def registry_page(readme: str, repository: str) -> str:
    """The README for a page outside the repository: relative links and pictures made absolute, or text without them."""

    def link(match: re.Match[str]) -> str:
        picture, text, path = match.groups()
        if not repository:
            return f"(picture: {text})" if picture else text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/HEAD/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)", link, readme)


def registry_links(repository: str) -> dict[str, str]:
    """What the registry's page links to: nothing before the repository has an address."""
    if not repository:
        return {}
    return {"Repository": repository, "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md"}


if __name__ == "__main__":
    setup(
        long_description=registry_page(Path("README.md").read_text(encoding="utf-8"), REPOSITORY),
        long_description_content_type="text/markdown",
        project_urls=registry_links(REPOSITORY),
        ext_modules=[
            Extension(
                "hf_int8_paged.kernels.cpu._int8_paged_cpu",
                sources=sorted(str(path) for path in SOURCES.glob("*.c")),
                depends=sorted(str(path) for path in SOURCES.glob("*.h")),
                extra_compile_args=[*FLAGS, "-Wno-psabi"],
                libraries=["m"],
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildCpuKernels, "bdist_wheel": AnyPythonWheel},
    )
