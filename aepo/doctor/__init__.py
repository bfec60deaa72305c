"""`aepo doctor`: what is here, what is missing, and the command that gets it.

Every line is looked at, not assumed: kernels are run and compared with the reference, the sandbox is tried. Works with
torch alone installed (then as plain text, without the table); `python -m aepo.doctor` is the same command.
"""

from aepo.doctor.examination import main

__all__ = ["main"]
