"""EntropyWorkerExtension: what the worker answers. Its methods are called by aepo.vllm.client.

Only dict, list, str, int, float and bool are returned: vLLM passes nothing else between its processes, and a NumPy
scalar would hang the caller. What is wrong with a key is data, too; the client raises it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import vllm
from vllm.distributed import get_pp_group

import aepo.vllm.weights.worker  # noqa: F401  # registers the weight-transfer backend in the worker
from aepo.vllm.decisions import decide
from aepo.vllm.processor import EntropyProcessor


class EntropyWorkerExtension:
    """Mixed into vLLM's worker by worker_extension_cls="aepo.vllm.EntropyWorkerExtension".

    Ranks of tensor parallelism record the same; of pipeline parallelism only the last one samples, and the others
    return None.
    """

    model_runner: Any
    vllm_config: Any
    weight_transfer_engine: Any

    def aepo_fetch(self, counts: Mapping[str, int | None]) -> dict[str, dict[str, Any]] | None:
        """Entropies by key, removed; nothing is removed where any key has a problem."""
        processor = self.aepo_processor()
        if processor is None:
            return None
        values, problems = processor.records.read(counts)
        if not problems:
            processor.records.drop(counts)
        return {"values": values, "problems": problems}

    def aepo_decide(self, queries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]] | None:
        processor = self.aepo_processor()
        if processor is None:
            return None
        log_vocabulary = math.log(self.vllm_config.model_config.get_vocab_size())
        speculation = self.vllm_config.speculative_config
        drafted = 0 if speculation is None else speculation.num_speculative_tokens
        values, problems = decide(processor.records, queries, log_vocabulary, drafted)
        return {"values": values, "problems": problems}

    def aepo_forget(self, keys: list[str] | None) -> int | None:
        processor = self.aepo_processor()
        return None if processor is None else processor.records.drop(keys)

    def aepo_status(self) -> dict[str, int | str] | None:
        processor = self.aepo_processor()
        if processor is None:
            return None
        records, config = processor.records, self.vllm_config.model_config
        return {
            "records": len(records),
            "tokens": records.tokens,
            "capacity": records.limit,
            "live": records.live,
            "vllm": vllm.__version__,
            "runner": processor.runner,
            "logprobs_mode": str(config.logprobs_mode),
            "vocab_size": config.get_vocab_size(),
            "max_model_len": config.max_model_len,
        }

    def aepo_nonce(self) -> str | None:
        """Of the weight update that has been started; a manifest must have it."""
        return getattr(self.weight_transfer_engine, "nonce", None)

    def aepo_staged(self) -> str | None:
        """Version of the weights that were accepted and are not loaded yet."""
        return getattr(self.weight_transfer_engine, "staged_version", None)

    def aepo_loads(self) -> int:
        """How often this worker has begun to load new weights, so that a failure before and one after can be told."""
        return getattr(self.weight_transfer_engine, "loads", 0)

    def aepo_processor(self) -> EntropyProcessor | None:
        """This worker's processor, from now on the first in line: before penalties and biases change the logits."""
        if not get_pp_group().is_last_rank:
            return None
        runner = self.model_runner
        if hasattr(runner, "input_batch"):
            line = runner.input_batch.logitsprocs.non_argmax_invariant
        else:
            line = runner.sampler.logits_processors
        processors = [processor for processor in line if isinstance(processor, EntropyProcessor)]
        if len(processors) != 1:
            raise RuntimeError(
                f'expected logits_processors=["aepo.vllm:EntropyProcessor"] once; found {len(processors)}'
            )
        if not processors[0].is_first:
            line.remove(processors[0])
            line.insert(0, processors[0])
            processors[0].is_first = True
        return processors[0]
