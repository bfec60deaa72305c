"""The specification: the three stages in plain PyTorch, in any dtype up to float64, written to be read."""

from aepo_kernels.reference.logits_grad import logits_grad
from aepo_kernels.reference.policy_terms import policy_terms
from aepo_kernels.reference.token_stats import token_stats

__all__ = ["logits_grad", "policy_terms", "token_stats"]
