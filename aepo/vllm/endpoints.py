"""EntropyEndpoints: routes of `vllm serve` with VLLM_PLUGINS=aepo: the functions of aepo.vllm.client, and new weights.

Every route wants one of the keys that guard /v1.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import State
from vllm import envs
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.protocol import EngineClient
from vllm.v1.engine.exceptions import EngineDeadError

from aepo.vllm import client
from aepo.vllm.messages import TOKENS, Refused, few, field, read_body, written
from aepo.vllm.weights import BACKEND, FileInitInfo, FileUpdateInfo, finish_update, signing_secret
from aepo.vllm.weights.manifest import check_fields

DIRECTORY = "AEPO_WEIGHTS_DIR"
WORDS = 1000  # characters of an error


@dataclass(frozen=True)
class Door:
    """Who comes in, and what is behind."""

    engine: EngineClient
    digests: Sequence[bytes]  # of the keys; none: the server listens on this machine only, and has no key
    weights_dir: str | None  # where new weights are read from
    no_weights: str | None  # why none are taken

    def admits(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]  # all are compared
        return not self.digests or (scheme.lower() == "bearer" and any(matches))


Handler = Callable[[Door, Any], Awaitable[dict[str, Any]]]


async def entropies(door: Door, body: Any) -> dict[str, Any]:
    """{"keys": [key, ..] or {key: number of output tokens}} -> {"entropies": {key: [nats or null, ..]},
    "weight_version": of the engine now}"""
    keys = few(field(body, "keys"))
    counts = keys.values() if isinstance(keys, dict) else ()
    if sum(count for count in counts if isinstance(count, int)) > TOKENS:
        raise Refused(400, f"keys ask for more than {TOKENS} tokens: ask in parts")
    return {
        "entropies": await client.fetch_entropies_async(door.engine, keys),
        "weight_version": await door.engine.get_weight_version(),
    }


async def decisions(door: Door, body: Any) -> dict[str, Any]:
    """{"queries": {key: query}} -> {"decisions": {key: decision or null}}"""
    return {"decisions": await client.fetch_decisions_async(door.engine, few(field(body, "queries")))}


async def forget(door: Door, body: Any) -> dict[str, Any]:
    """{"keys": [key, ..] or null for all} -> {"forgotten": how many}"""
    return {"forgotten": await client.forget_entropies_async(door.engine, few(field(body, "keys")))}


async def status(door: Door, body: Any) -> dict[str, Any]:
    """As entropy_status, and `weight_version`; `weights_dir`, from which new weights are read, or null and why not."""
    return {
        **await client.entropy_status_async(door.engine),
        "weight_version": await door.engine.get_weight_version(),
        "weights_dir": door.weights_dir,
        "no_weights": door.no_weights,
    }


async def start(door: Door, body: Any) -> dict[str, Any]:
    """{} -> {"nonces": [one per worker]}, which the manifest of the update must have"""
    await _taken(door, door.engine.start_weight_update)
    return {"nonces": await door.engine.collective_rpc("aepo_nonce")}


async def update(door: Door, body: Any) -> dict[str, Any]:
    """A signed manifest (aepo.vllm.weights.FileUpdateInfo) -> {}: all workers have checked its files"""
    _check_taken(door)
    if not isinstance(body, dict) or body.keys() - {one.name for one in fields(FileUpdateInfo)}:
        raise Refused(400, "body must be the manifest of an update")
    check_fields(FileUpdateInfo(**body))  # here, because vLLM cannot pass on to its workers all that JSON can say
    request = WeightTransferUpdateRequest(update_info=body)
    await _taken(door, lambda: door.engine.update_weights(request))
    return {}


async def finish(door: Door, body: Any) -> dict[str, Any]:
    """{} -> {"weight_version": of the update, which has been loaded and is stamped on tokens}"""
    versions = await door.engine.collective_rpc("aepo_staged")
    if versions[0] is None or len(set(versions)) > 1:
        raise Refused(409, "no update was accepted: the engine keeps its weights")
    await _taken(door, lambda: finish_update(door.engine, versions[0]))
    return {"weight_version": versions[0]}


async def withdraw(door: Door, body: Any) -> dict[str, Any]:
    """{} -> {}: an update that was started is given up"""
    request = WeightTransferUpdateRequest(update_info={"withdraw": True})
    await _taken(door, lambda: door.engine.update_weights(request))
    await _taken(door, door.engine.finish_weight_update)
    return {}


async def reset_prefix_cache(door: Door, body: Any) -> dict[str, Any]:
    """{} -> {"success": false where unfinished requests hold on to it}"""
    return {"success": await door.engine.reset_prefix_cache()}


async def _taken(door: Door, call: Callable[[], Awaitable[None]]) -> None:
    """A step of a weight update; the words of the worker that refuses it are the answer."""
    _check_taken(door)
    try:
        await call()
    except EngineDeadError:
        raise
    except Exception as error:
        raise Refused(409, client.own_words(error)) from error


def _check_taken(door: Door) -> None:
    if door.no_weights is not None:
        raise Refused(403, door.no_weights)


class EntropyEndpoints:
    """vLLM's EndpointPlugin. A wrong key answers 401, a body that is wrong 400, one that is too large 413, keys with a
    problem 409 and {"problems": {key: why}}, weights that are not taken 403 or 409."""

    name = "aepo"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        for handler in (entropies, decisions, forget):
            app.add_api_route(f"/aepo/{handler.__name__}", _route(handler), methods=["POST"])
        for handler in (start, update, finish, withdraw, reset_prefix_cache):
            app.add_api_route(f"/aepo/weights/{handler.__name__}", _route(handler), methods=["POST"])
        app.add_api_route("/aepo/status", _route(status), methods=["GET"])

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Fails where the server would be open, or was started without processor or extension. Puts the processor first
        in line, and tells the workers whose weights they take, before anybody else can."""
        assert engine_client is not None  # only a server without generation has none
        keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]  # as vLLM finds those of /v1
        if not is_local(args):
            if not keys:
                raise RuntimeError(
                    "VLLM_PLUGINS=aepo needs a key, --api-key or VLLM_API_KEY, unless the server listens on this "
                    "machine only (--host 127.0.0.1)"
                )
            if envs.VLLM_SERVER_DEV_MODE:
                raise RuntimeError(
                    "VLLM_SERVER_DEV_MODE=1 lets everybody who reaches this server change its weights: leave it off "
                    "(VLLM_PLUGINS=aepo does without), or listen on this machine only (--host 127.0.0.1)"
                )
        try:
            await client.entropy_status_async(engine_client)
        except Exception as error:
            raise RuntimeError(
                "VLLM_PLUGINS=aepo needs --logits-processors aepo.vllm:EntropyProcessor and --worker-extension-cls "
                "aepo.vllm.EntropyWorkerExtension"
            ) from error
        config = engine_client.vllm_config.weight_transfer_config
        directory, no_weights = os.environ.get(DIRECTORY) or None, None
        if directory is not None and not (Path(directory).is_absolute() and Path(directory).is_dir()):
            raise RuntimeError(f"{DIRECTORY} = {directory}: expected the absolute path of a directory")
        if config is None or config.backend != BACKEND:
            no_weights = f"""started without --weight-transfer-config '{{"backend": "{BACKEND}"}}'"""
        elif not keys:
            no_weights = "started without a key, --api-key or VLLM_API_KEY, which new weights are signed with"
        elif directory is None:
            no_weights = f"started without {DIRECTORY}, the directory that new weights are read from"
        if config is not None and config.backend == BACKEND:
            info = FileInitInfo([signing_secret(key) for key in keys], directory)
            await engine_client.init_weight_transfer_engine(
                WeightTransferInitRequest({"secrets": info.secrets, "directory": info.directory})
            )
        digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        state.aepo = Door(engine_client, digests, None if no_weights else directory, no_weights)


def is_local(args: Namespace) -> bool:
    """Whether only this machine can reach the server."""
    if args.uds:
        return True
    try:
        return args.host == "localhost" or ipaddress.ip_address(args.host or "0.0.0.0").is_loopback
    except ValueError:  # another name
        return False


def _route(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        door: Door = request.app.state.aepo
        if not door.admits(request.headers.get("authorization", "")):
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        try:
            body = await read_body(request) if request.method == "POST" else None
            answer = await handler(door, body)
            return Response(await asyncio.to_thread(written, answer), media_type="application/json")
        except client.EntropyError as error:
            return JSONResponse({"problems": error.problems}, status_code=409)
        except Refused as error:
            return JSONResponse({"error": str(error)[:WORDS]}, status_code=error.status)
        except (TypeError, ValueError, OverflowError) as error:
            return JSONResponse({"error": str(error)[:WORDS]}, status_code=400)

    route.__doc__ = handler.__doc__
    return route
