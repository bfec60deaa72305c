"""Build the native extension `aepo_kernels._C`. All other metadata is in pyproject.toml.

The extension must be compiled against the torch that it will run with, so torch is not a build requirement that pip
would fetch on its own. `pip install .` (and with `--no-build-isolation`, or `python setup.py build_ext --inplace`) uses
the torch of the environment that it installs into.

Where nvcc is found (CUDA_HOME, /usr/local/cuda, PATH) the CUDA kernels of csrc/cuda/ become part of the extension, also
for a CPU build of torch: they know nothing of torch, and the CUDA runtime is linked statically. AEPO_CUDA=0 leaves them
out, AEPO_CUDA=1 makes a missing nvcc an error.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import platform
import shutil
import subprocess
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
    if not {"sdist", "egg_info", "dist_info"} & set(sys.argv):  # which compile nothing
        raise SystemExit(
            f"aepo-kernels builds its extension against your torch ({error}): install torch, and where it is installed "
            "but your tool hides it (uv, python -m build), setuptools and ninja too; then build without isolation "
            "(uv pip install --no-build-isolation, python -m build --no-isolation)"
        ) from None
    from setuptools import Extension as CppExtension
    from setuptools.command.build_ext import build_ext as BuildExtension

ROOT = pathlib.Path(__file__).parent
CSRC = ROOT / "csrc"
INCLUDE = CSRC / "include"

# -fopenmp: at::parallel_for is an inline function and silently serial without it.
# No -ffast-math: the kernels must see NaN and inf, and its reassociation would break bitwise repeatability.
COMPILE_ARGS = ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-g0"]

# A100; H100; B200 and B300. Other GPUs run the code of an older one of their generation, or the PTX of the last.
GPU_ARCHITECTURES = ("80", "90a", "100")


def find_nvcc() -> pathlib.Path | None:
    """The CUDA compiler, or None where there is none or AEPO_CUDA=0 forbids it."""
    wanted = os.environ.get("AEPO_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"AEPO_CUDA must be 0, 1 or not set; got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else ["/usr/local/cuda/bin/nvcc", "nvcc"]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return pathlib.Path(found).resolve()
    if wanted == "1":
        raise SystemExit(f"AEPO_CUDA=1, but there is no CUDA compiler: looked for {' and '.join(candidates)}")
    return None


def find_static_runtime(nvcc: pathlib.Path) -> pathlib.Path:
    """The folder of libcudart_static.a, beside nvcc's."""
    home = nvcc.parents[1]
    folders = [home / name for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")]
    for folder in folders:
        if (folder / "libcudart_static.a").exists():
            return folder
    looked = ", ".join(map(str, folders))
    raise SystemExit(f"{nvcc} has no libcudart_static.a in {looked}; AEPO_CUDA=0 builds without CUDA kernels")


def gpu_architectures(nvcc: pathlib.Path) -> list[str]:
    """Those of GPU_ARCHITECTURES that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [arch for arch in GPU_ARCHITECTURES if f"compute_{arch.rstrip('a')}" in listed]
    if not known:
        raise SystemExit(
            f"{nvcc} compiles for none of sm_{', sm_'.join(GPU_ARCHITECTURES)}; AEPO_CUDA=0 builds without"
        )
    return known


def nvcc_flags(architectures: list[str]) -> list[str]:
    flags = ["-O3", "-std=c++17", f"-I{INCLUDE}", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for arch in architectures:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    newest = architectures[-1].rstrip("a")  # PTX of an "a" target runs on that target only
    return [*flags, "-gencode", f"arch=compute_{newest},code=compute_{newest}"]


class Build(BuildExtension):
    """torch's builder, which refuses CUDA sources for a CPU build of torch; here nvcc compiles them first."""

    def build_extensions(self) -> None:
        (extension,) = self.extensions
        nvcc = find_nvcc()
        if nvcc is None:
            print("building without CUDA kernels: no nvcc, or AEPO_CUDA=0")
        else:
            architectures = gpu_architectures(nvcc)
            print(f"building CUDA kernels with {nvcc} for sm_{', sm_'.join(architectures)}")
            extension.extra_objects += self.compile_cuda(nvcc, nvcc_flags(architectures))
            extension.define_macros.append(("AEPO_CUDA", f'"sm_{" sm_".join(architectures)}"'))
            # Hidden, or the CUDA runtime of a CUDA build of torch would take the place of ours while loading.
            hidden = "-Wl,--exclude-libs,libcudart_static.a"
            runtime = find_static_runtime(nvcc)
            extension.extra_link_args += [f"-L{runtime}", hidden, "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        super().build_extensions()

    def compile_cuda(self, nvcc: pathlib.Path, flags: list[str]) -> list[str]:
        """Objects of all csrc/cuda/*.cu; one is compiled again if it, a header or this file is newer."""
        folder = pathlib.Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        headers = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh")]
        commands = []
        objects = []
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        if not sources:  # it would build, and then not import
            raise SystemExit(f"no CUDA sources in {CSRC / 'cuda'}: this copy of aepo-kernels is not complete")
        for source in sources:
            target = folder / f"{source.stem}.o"
            objects.append(str(target))
            newest = max(path.stat().st_mtime for path in [source, *headers, pathlib.Path(__file__)])
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                commands.append([nvcc, *flags, "-c", source, "-o", target])
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            codes = list(pool.map(lambda command: subprocess.run(command).returncode, commands))
        if any(codes):
            raise SystemExit(f"{nvcc} failed, see above; AEPO_CUDA=0 builds without CUDA kernels")
        return objects


setup(
    ext_modules=[
        CppExtension(
            "aepo_kernels._C",
            sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.cpp")),
            include_dirs=[str(INCLUDE)],
            depends=sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.h")),
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": Build},
)
