"""Requests with keys, and the truth about their entropies."""

import torch
from vllm import SamplingParams

from aepo.vllm import entropy_status

# Entropies of up to ln 260 = 5.6 nats. decode_entropy promises 1e-5 of that (aepo_kernels/testing.py), and the engine's
# forward pass in float32 adds its own; together it was below 1e-6 nats here. Another token's is off by 1e-3 or more.
NATS = 2e-5


def params(key=None, tokens=12, temperature=1.0, **changes):
    extra_args = None if key is None else {"aepo_key": key}
    # exactly so many tokens, whatever is sampled
    return SamplingParams(
        max_tokens=tokens, temperature=temperature, extra_args=extra_args, **{"ignore_eos": True, **changes}
    )


def generate(llm, prompts, sampling):
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [output.outputs[0] for output in llm.generate(requests, sampling, use_tqdm=False)]


def from_logprobs(completion, temperature):
    """Entropy per token in float64 of softmax(log-probs / T), from the engine's own full-vocabulary log-probs."""
    rows = torch.tensor([[entry.logprob for _, entry in sorted(row.items())] for row in completion.logprobs])
    return entropy(rows.double() / (temperature or 1.0))


def from_model(model, prompt, completion, temperature, counted=slice(None)):
    """The same from a float64 transformers model that reads prompt and completion; over the tokens `counted`."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return entropy(logits[:, counted] / (temperature or 1.0))


def entropy(logits):
    logprobs = torch.log_softmax(logits, -1)
    return (-(logprobs.exp() * logprobs).sum(-1)).tolist()


def in_use(llm):
    status = entropy_status(llm)
    return status["records"], status["tokens"], status["live"]
