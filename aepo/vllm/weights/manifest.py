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
import reprlib
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo

PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")  # a name that stays in its directory
VERSION = re.compile(r"[!-~]{1,64}")  # ASCII without spaces; it goes onto tokens and into logs
SHA256 = re.compile(r"[0-9a-f]{64}")
FILES = 65_536  # of one update; about 1 GB each
WORDS = 200  # characters of a value in a message; reprlib alone makes 390,000 of lists in lists


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
    """ManifestError unless one of the secrets `trusted` has signed it for the worker with this nonce, and every field
    is what it must be, names those of something inside the directory."""
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
    check_fields(info)
    if nonce is None or nonce not in info.nonces:
        raise ManifestError("the update was not made for this call of start_weight_update")


def check_fields(info: FileUpdateInfo) -> None:
    """ManifestError unless every field is what it must be. A signature says who has made it, not that it is well made.
    vLLM hands all of it on unseen: a version that is no text ended the engine with the next token."""
    _expect("version", info.version, _matches(info.version, VERSION), "1 to 64 printable ASCII characters, no spaces")
    _expect("withdraw", info.withdraw, info.withdraw is False, "false")
    _expect("tensors", info.tensors, _is_count(info.tensors), "an int >= 0")
    nonces = info.nonces
    known = isinstance(nonces, list) and all(_matches(nonce, PLAIN) for nonce in nonces)
    _expect("nonces", nonces, known, "a list of texts, letters and digits")
    _expect("signature", info.signature, _matches(info.signature, SHA256), "64 hex digits, lower case")
    files = info.files
    _expect("files", files, isinstance(files, list) and len(files) <= FILES, f"a list of at most {FILES}")
    _expect_plain("directory", info.directory)
    for i, file in enumerate(files):
        described = isinstance(file, dict) and file.keys() == {"name", "bytes", "sha256"}
        _expect(f"files[{i}]", file, described, "name, bytes and sha256")
        _expect_plain(f"files[{i}].name", file["name"])
        _expect(f"files[{i}].bytes", file["bytes"], _is_count(file["bytes"]), "an int >= 0")
        _expect(f"files[{i}].sha256", file["sha256"], _matches(file["sha256"], SHA256), "64 hex digits, lower case")


def _expect_plain(field: str, name: object) -> None:
    _expect(field, name, _matches(name, PLAIN), "a plain name: letters, digits, '_', '-', and '.' inside, at most 255")


def _expect(field: str, found: object, is_right: bool, expected: str) -> None:
    if not is_right:
        raise ManifestError(f"{field} of the update = {shown(found)}: expected {expected}")


def shown(value: object) -> str:
    """For a message: short, whatever it is."""
    return reprlib.repr(value)[:WORDS]


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _matches(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _canonical(info: FileUpdateInfo) -> str:
    return json.dumps({**asdict(info), "signature": None}, sort_keys=True, separators=(",", ":"))


def _hmac(key: str, text: str) -> str:
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()
