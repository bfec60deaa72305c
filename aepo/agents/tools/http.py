"""A retriever in the network as a search tool: the interface of Search-R1's /retrieve."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from aepo.agents.protocol import ToolError

MAX_ANSWER_BYTES = 2**24
NO_RESULTS = "no results"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: followed as a GET, it would send the query to a host that nobody named."""

    def redirect_request(self, *_: Any) -> None:
        return None


class RetrieveTool:
    """Posts {"queries": [query], "topk": top_k, "return_scores": true} and returns the documents that come back.

    It understands an answer {"result": [documents]} or [documents], one list for the one query, where a document is a
    text, {"contents": text} or {"document": {"contents": text}}; "text" may stand for "contents", and a "title" comes
    before it.
    """

    description = "Search the documents. Returns the ones that match the query best."
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to look for."}},
        "required": ["query"],
    }

    def __init__(self, url: str, timeout: float, *, top_k: int = 3, name: str = "search") -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        self.name = name
        self.timeout = timeout
        self._url = url
        self._top_k = top_k
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __call__(self, query: str) -> str:
        answer = self._post({"queries": [query], "topk": self._top_k, "return_scores": True})
        documents = [text for text in map(_text_of, _found(answer)[: self._top_k]) if text.strip()]
        between = "\n\n" if any("\n" in document for document in documents) else "\n"
        return between.join(documents) or NO_RESULTS

    def __repr__(self) -> str:
        return f"{self.name} of {self._url}"

    def _post(self, body: Mapping[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._url, data, {"Content-Type": "application/json"}, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                answer = response.read(MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise ToolError(f"error: the retriever answered {error.code} {error.reason}") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise TimeoutError(f"no answer after {self.timeout:g} s") from None
            raise ToolError(f"error: the retriever cannot be reached: {reason}") from None
        if len(answer) > MAX_ANSWER_BYTES:
            raise ToolError(f"error: the retriever answered more than {MAX_ANSWER_BYTES:,} bytes")
        try:
            return json.loads(answer)
        except ValueError:
            raise ToolError(f"error: the retriever answered {_shown(answer)}, which is no JSON") from None


def _found(answer: Any) -> list[Any]:
    """The documents of the one query."""
    found = answer.get("result", answer.get("results")) if isinstance(answer, dict) else answer
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], list):
        return found[0]
    raise ToolError(f"error: the retriever answered {_shown(answer)}; expected one list of documents")


def _text_of(document: Any) -> str:
    if isinstance(document, str):
        return document
    if isinstance(document, dict):
        if "document" in document:
            return _text_of(document["document"])
        text = document.get("contents", document.get("text"))
        if isinstance(text, str):
            title = document.get("title")
            return f"{title}\n{text}" if isinstance(title, str) and title else text
    raise ToolError(f"error: the retriever answered a document without contents: {_shown(document)}")


def _shown(value: Any) -> str:
    text = value[:80].decode("utf-8", "replace") if isinstance(value, bytes) else json.dumps(value)[:80]
    return repr(text)
