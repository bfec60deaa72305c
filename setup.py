"""Build the native extension `aepo_kernels._C`. All other metadata is in pyproject.toml.

The extension must be compiled against the torch that it will run with, so torch is not a build requirement that pip
would fetch on its own. `pip install .` (and with `--no-build-isolation`, or `python setup.py build_ext --inplace`) uses
the torch of the environment that it installs into.
"""

import pathlib
import sys
import sysconfig

from setuptools import setup

try:
    import torch  # noqa: F401
except ModuleNotFoundError:
    # pip's isolated build hides the environment's packages. Last on the path, they only supply what is missing.
    sys.path.append(sysconfig.get_path("purelib"))

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    raise SystemExit(
        f"aepo builds its extension against your torch ({error}): install torch first, then aepo"
    ) from None

ROOT = pathlib.Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))

# -fopenmp: at::parallel_for is an inline function and silently serial without it.
# No -ffast-math: the kernels must see NaN and inf, and its reassociation would break bitwise repeatability.
COMPILE_ARGS = ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-g0"]

setup(
    ext_modules=[
        CppExtension(
            "aepo_kernels._C",
            SOURCES,
            include_dirs=[str(ROOT / "csrc" / "include")],
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
