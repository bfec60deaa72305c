"""`aepo bench`: how fast the kernels are on this machine, beside what other libraries offer.

One question per module (token_stats, policy_loss, linear, decode, sample), each a list of problems; `harness.py` says
how all of them are measured, `peers.py` what they are compared with, `run.py` puts them together.
"""
