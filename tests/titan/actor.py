"""torchtitan's own PolicyTrainer, as an actor on a CPU: `python tests/titan/actor.py` prints a line of JSON.

Two parts of it want a GPU and are exchanged: the name of the device, and FlexAttention, whose backward torch does not
have on CPUs (the same masks go to scaled_dot_product_attention). The package's __init__ wants vLLM and is left out.
"""

import asyncio
import json
import os
import socket
import sys
import tempfile

import torch
import torch.nn.functional as F
from monarch.actor import concurrent_endpoint, this_proc
from torch.nn.attention.flex_attention import create_mask
from torchtitan.tools import utils

utils.device_type, utils.device_module = "cpu", torch.cpu  # before others import the names
from titan_toys import rl_package  # noqa: E402

rl_package()
from torchtitan.components.loss import ChunkedLossWrapper  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402
from torchtitan.config import CompileConfig, DebugConfig, TrainingConfig  # noqa: E402
from torchtitan.experiments.rl.actors.trainer import PolicyTrainer  # noqa: E402
from torchtitan.experiments.rl.losses import DAPOLoss  # noqa: E402
from torchtitan.experiments.rl.types import TrainingMicrobatch  # noqa: E402
from torchtitan.models.common.attention import FlexAttention  # noqa: E402
from torchtitan.models.qwen3 import model_registry  # noqa: E402

from aepo.integrations.titan import AEPOLoss  # noqa: E402
from aepo_kernels import entropy_from_logits  # noqa: E402
from aepo_kernels.entropy_advantage import entropy_statistics  # noqa: E402

with socket.socket() as free:
    free.bind(("localhost", 0))
    PORT = free.getsockname()[1]
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(PORT)}
VOCAB, ROWS, LENGTH = 2048, 2, 32  # of torchtitan's debugmodel


def attention(q, k, v, *, block_mask, scale, enable_gqa, **_):
    mask = create_mask(block_mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device="cpu")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa), None


FlexAttention.compiled_flex_attn = staticmethod(attention)


class EntropyTrainer(PolicyTrainer):
    """PolicyTrainer that can look at all micro-batches of a step before the first of them is trained on."""

    @concurrent_endpoint
    async def measure_entropy(self, microbatches: list[list[TrainingMicrobatch]]) -> None:
        loss = self.loss_fn.loss_fn if isinstance(self.loss_fn, ChunkedLossWrapper) else self.loss_fn
        entropies, masks = [], []
        with self.train_context(), torch.no_grad():
            for microbatch in microbatches:
                own = microbatch[self.dp_rank]
                attention_masks = self.model.get_attention_masks(own.positions)
                found = self.model(own.token_ids, attention_masks=attention_masks, positions=own.positions)
                if loss is not self.loss_fn:  # hidden states: the head by chunks, as in training
                    heads = (self.model.lm_head(chunk) for chunk in found.chunk(self.loss_fn.num_chunks, dim=1))
                    entropies.append(torch.cat([entropy_from_logits(logits) for logits in heads], dim=1))
                else:
                    entropies.append(entropy_from_logits(found))
                masks.append(own.loss_mask & own.generator_logprobs.isfinite())
        mesh = self.parallel_dims.get_optional_mesh("loss")
        group = None if mesh is None else mesh.get_group()
        loss.set_entropy_stats(*entropy_statistics(torch.cat(entropies), torch.cat(masks), process_group=group))


def microbatches():
    """Two, of which the second has fewer tokens; rows of two samples each."""
    g = torch.Generator().manual_seed(0)
    for share in (1.0, 0.3):
        yield TrainingMicrobatch(
            token_ids=torch.randint(VOCAB, (ROWS, LENGTH), generator=g),
            labels=torch.randint(VOCAB, (ROWS, LENGTH), generator=g),
            positions=torch.arange(LENGTH // 2).repeat(ROWS, 2),
            generator_logprobs=-7.6 + 0.3 * torch.randn(ROWS, LENGTH, generator=g),
            loss_mask=torch.rand(ROWS, LENGTH, generator=g) < share,
            advantages=torch.randn(ROWS, LENGTH, generator=g),
        )


async def train(name, loss, directory):
    """(metrics of each micro-batch, those of the optimiser step), of one step."""
    spec = model_registry("debugmodel", attn_backend="flex")
    spec.model.layers = spec.model.layers[:2]
    config = PolicyTrainer.Config(
        optimizer=default_adamw(lr=1e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1),
        training=TrainingConfig(seq_len=LENGTH, steps=10),
        debug=DebugConfig(seed=1),
        loss=loss,
    )
    trainer = this_proc().spawn(
        name, EntropyTrainer, config, model_spec=spec, compile_config=CompileConfig(enable=False), output_dir=directory
    )
    batches = [[one] for one in microbatches()]
    tokens = sum(int(one.loss_mask.sum()) for (one,) in batches)
    if name.startswith("aepo"):
        await trainer.measure_entropy.call_one(batches)
    parts = [await trainer.forward_backward.call_one(batch, tokens) for batch in batches]
    step = (await trainer.optim_step.call_one()).metrics
    torch.distributed.destroy_process_group()  # the next trainer makes its own
    return parts, step


async def main():
    dapo, aepo = AEPOLoss.Config(preset="dapo"), AEPOLoss.Config(objective={"entropy_advantage": 0.5})
    losses = {
        "theirs": DAPOLoss.Config(ratio_clip_high=0.28),
        "dapo": dapo,
        "dapo_chunks": ChunkedLossWrapper.Config(num_chunks=4, loss_fn=dapo),
        "aepo": aepo,
        "aepo_chunks": ChunkedLossWrapper.Config(num_chunks=4, loss_fn=aepo),
    }
    with tempfile.TemporaryDirectory() as directory:
        found = {name: await train(name, loss, directory) for name, loss in losses.items()}
    print(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
