"""One step of AEPOAsyncTrainer on each rank of a group, for test_trl_async: gradients and logs to files in argv[1]."""

import os
import sys
from pathlib import Path

import async_toys
import torch
from async_toys import OwnLoss, make_async_trainer, tree_samples

from aepo.integrations.trl.asynchronous import AEPOAsyncConfig, AEPOAsyncTrainer

RUNS = {"aepo": {"preset": "aepo"}, "gspo": {"preset": "gspo"}, "own": {"own": {"loss_fn": OwnLoss()}}}


def main(folder: Path) -> None:
    async_toys.run_on_a_cpu(setattr)
    for name, changed in RUNS.items():
        trainer = make_async_trainer(
            AEPOAsyncTrainer, AEPOAsyncConfig, folder, tree_samples(), per_device=2, accumulation=2, **changed
        )
        trainer.train()
        found = (trainer.gradients.found, trainer.state.log_history[0])
        torch.save(found, folder / f"{name}-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", **ranks)
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
