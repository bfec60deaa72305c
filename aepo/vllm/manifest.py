"""What a trainer tells the engines of a weight update, signed with a secret that both have.

An engine takes an update once, whoever brings it: the signature covers random numbers that its workers have made for
this update (`nonces`), the SHA-256 of every file, and the version.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo

PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a name that stays in its directory


class ManifestError(ValueError):
    """An update that must not be taken. The message repeats nothing of a manifest whose signature is wrong."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """Where the new weights are: files of `directory`, an entry of the directory that the engine reads from.

    withdraw: no weights; an update that was accepted is given up. It needs no signature.
    """

    directory: str | None = None
    files: list[dict[str, int | str]] = field(default_factory=list)  # each with name, bytes and sha256 (hex)
    tensors: int = 0
    version: str = ""
    nonces: list[str] = field(default_factory=list)  # one per worker of the engine
    signature: str = ""
    withdraw: bool = False


@functools.cache
def process_secret() -> str:
    """For engines that this process has started: nobody else can sign for them."""
    return secrets.token_hex(32)


def signing_secret(api_key: str) -> str:
    """For servers: made of the key that guards their routes."""
    return _hmac(api_key, "aepo weight update")


def signed(info: FileUpdateInfo, nonces: Sequence[str], secret: str) -> FileUpdateInfo:
    """For one engine, whose workers have made these nonces."""
    info = replace(info, nonces=list(nonces))
    return replace(info, signature=_hmac(secret, _canonical(info)))


def check(info: FileUpdateInfo, nonce: str | None, trusted: Sequence[str]) -> None:
    """ManifestError unless one of the secrets `trusted` has signed it for the worker with this nonce, and every name is
    that of something inside the directory."""
    if not trusted or not all(trusted):  # anybody can sign with an empty one
        raise ManifestError(
            "this engine takes no weights: it was given no key; vllm serve needs VLLM_PLUGINS=aepo and --api-key or "
            "VLLM_API_KEY"
        )
    signature = info.signature if isinstance(info.signature, str) and info.signature.isascii() else ""
    content = _canonical(info)
    matches = [hmac.compare_digest(_hmac(secret, content), signature) for secret in trusted]  # all are compared
    if not any(matches):
        raise ManifestError("the update is not signed with the key of this engine")
    if nonce is None or nonce not in info.nonces:
        raise ManifestError("the update was not made for this call of start_weight_update")
    for name in (info.directory, *(file["name"] for file in info.files)):
        if not isinstance(name, str) or not PLAIN.fullmatch(name):
            raise ManifestError(f"{name!r} is no plain name: expected letters, digits, '_', '-', and '.' inside")


def _canonical(info: FileUpdateInfo) -> str:
    return json.dumps({**asdict(info), "signature": None}, sort_keys=True, separators=(",", ":"))


def _hmac(key: str, text: str) -> str:
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()
