"""AEPO: Agentic Entropy-Balanced Policy Optimization (arXiv 2510.14545), a lean trainer for tool-using agents."""


def __getattr__(name: str) -> str:
    if name == "__version__":  # of the one distribution; late, because aepo_kernels imports torch
        from aepo_kernels import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
