"""Triton kernels and their launchers, one stage per file. Imported only when a call is served by Triton."""
