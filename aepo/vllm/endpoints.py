"""EntropyEndpoints: the functions of aepo.vllm.client as routes of `vllm serve`, on with VLLM_PLUGINS=aepo."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from aepo.vllm import client

Handler = Callable[[EngineClient, Any], Awaitable[dict[str, Any]]]


async def entropies(engine: EngineClient, body: Any) -> dict[str, Any]:
    """{"keys": [key, ..] or {key: number of output tokens}} -> {"entropies": {key: [nats or null, ..]},
    "weight_version": of the engine now}"""
    fetched = await client.fetch_entropies_async(engine, _field(body, "keys"))
    return {
        "entropies": {key: [_number(value) for value in values] for key, values in fetched.items()},
        "weight_version": await engine.get_weight_version(),
    }


async def decisions(engine: EngineClient, body: Any) -> dict[str, Any]:
    """{"queries": {key: query}} -> {"decisions": {key: decision or null}}"""
    fetched = await client.fetch_decisions_async(engine, _field(body, "queries"))
    return {
        "decisions": {
            key: None if decision is None else {name: _number(value) for name, value in decision.items()}
            for key, decision in fetched.items()
        }
    }


async def forget(engine: EngineClient, body: Any) -> dict[str, Any]:
    """{"keys": [key, ..] or null for all} -> {"forgotten": how many}"""
    return {"forgotten": await client.forget_entropies_async(engine, _field(body, "keys"))}


async def status(engine: EngineClient, body: Any) -> dict[str, Any]:
    return await client.entropy_status_async(engine)


class EntropyEndpoints:
    """vLLM's EndpointPlugin. A body that is wrong answers 400, keys with a problem 409 and {"problems": {key: why}}."""

    name = "aepo"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        for handler in (entropies, decisions, forget):
            app.add_api_route(f"/aepo/{handler.__name__}", self._route(handler), methods=["POST"])
        app.add_api_route("/aepo/status", self._route(status), methods=["GET"])

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Fails where the server was started without processor or extension; puts the processor first in line."""
        if engine_client is not None:
            try:
                await client.entropy_status_async(engine_client)
            except Exception as error:
                raise RuntimeError(
                    "VLLM_PLUGINS=aepo needs --logits-processors aepo.vllm:EntropyProcessor and --worker-extension-cls "
                    "aepo.vllm.EntropyWorkerExtension"
                ) from error
        state.aepo_engine = engine_client

    @staticmethod
    def _route(handler: Handler) -> Callable[[Request], Awaitable[JSONResponse]]:
        async def route(request: Request) -> JSONResponse:
            try:
                body = await request.json() if request.method == "POST" else None
                return JSONResponse(await handler(request.app.state.aepo_engine, body))
            except client.EntropyError as error:
                return JSONResponse({"problems": error.problems}, status_code=409)
            except (json.JSONDecodeError, TypeError, ValueError) as error:
                return JSONResponse({"error": str(error)}, status_code=400)

        route.__doc__ = handler.__doc__
        return route


def _field(body: Any, name: str) -> Any:
    if not isinstance(body, dict) or body.keys() != {name}:
        raise ValueError(f"body must be an object with {name!r} and nothing else; got {body!r}")
    return body[name]


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
