"""AEPO in TRL: a trainer on GRPOTrainer, and the kernels alone for scripts that stay as they are (docs/trl.md)."""

from aepo.integrations.trl.versions import check_trl

check_trl()  # before TRL's names are looked for: what is missing is said in words

from aepo.integrations.trl.config import AEPOConfig  # noqa: E402
from aepo.integrations.trl.head import patch_trl, unpatch_trl  # noqa: E402
from aepo.integrations.trl.trainer import AEPOTrainer  # noqa: E402

__all__ = ["AEPOConfig", "AEPOTrainer", "patch_trl", "unpatch_trl"]
