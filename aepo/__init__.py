"""AEPO: Agentic Entropy-Balanced Policy Optimization (arXiv 2510.14545), a lean trainer for tool-using agents."""

__version__ = "0.1.0"
