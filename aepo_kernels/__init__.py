"""Fused entropy, log-prob and policy-loss operations for reinforcement learning of language models.

Importing this needs torch alone: Triton and the compiled extension load when a call first uses them.
"""

from aepo_kernels import advantages
from aepo_kernels.linear_head import LinearHead
from aepo_kernels.objective import PolicyObjective
from aepo_kernels.ops.decode_entropy import decode_entropy
from aepo_kernels.ops.linear_logprobs_and_entropy import linear_logprobs_and_entropy
from aepo_kernels.ops.linear_loss import linear_loss
from aepo_kernels.ops.linear_policy_loss import linear_policy_loss
from aepo_kernels.ops.logits_loss import logits_loss
from aepo_kernels.ops.logits_policy_loss import logits_policy_loss
from aepo_kernels.ops.logprobs_and_entropy import entropy_from_logits, logprobs_and_entropy, selective_log_softmax
from aepo_kernels.ops.next_token_targets import next_token_targets
from aepo_kernels.ops.policy_loss import PolicyLoss, policy_loss
from aepo_kernels.ops.sample_with_entropy import SampledTokens, sample_with_entropy

__version__ = "0.1.0"  # of the distribution, and so of `aepo` too: the only place where it stands

__all__ = [
    "LinearHead",
    "PolicyLoss",
    "PolicyObjective",
    "SampledTokens",
    "advantages",
    "decode_entropy",
    "entropy_from_logits",
    "linear_logprobs_and_entropy",
    "linear_loss",
    "linear_policy_loss",
    "logits_loss",
    "logits_policy_loss",
    "logprobs_and_entropy",
    "next_token_targets",
    "policy_loss",
    "sample_with_entropy",
    "selective_log_softmax",
]
