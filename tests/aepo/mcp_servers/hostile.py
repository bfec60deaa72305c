"""An MCP server, written by hand over its pipes, that misbehaves as its argument and its tools say."""

import json
import os
import signal
import sys
import threading
import time


def send(message):
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def text(value):
    return {"content": [{"type": "text", "text": value}]}


def flood(stream, line):
    while True:
        stream.write(line)


def call(name, arguments):
    """A result, or None: there will be no answer."""
    if name == "echo":
        return text(arguments.get("text", ""))
    if name == "surrogate":
        return text("half \ud83d of a pair, \ud83d\ude00")
    if name == "pid":
        return text(str(os.getpid()))
    if name == "slow":
        time.sleep(0.3)
        return text("slow")
    if name == "die":
        print("\nI am dying\n", file=sys.stderr, flush=True)
        os._exit(3)
    if name == "hang":
        time.sleep(1000)
    if name == "huge":
        return text("x" * arguments["n"])
    if name == "huge-line":
        sys.stdout.write("x" * arguments["n"] + "\n")
        return text("after")
    if name == "logs":
        note = json.dumps(
            {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "x"}}
        )
        threading.Thread(target=flood, args=(sys.stdout, note + "\n"), daemon=True).start()
        threading.Thread(target=flood, args=(sys.stderr, "noise\n"), daemon=True).start()
        return text("flooding")
    if name == "requests":  # and never reads the answers
        flood(sys.stdout, json.dumps({"jsonrpc": "2.0", "id": "ping", "method": "ping"}) + "\n")
    if name == "fails":
        return {**text("no such city"), "isError": True}
    if name == "image":
        return {
            "content": [{"type": "text", "text": "see"}, {"type": "image", "data": "AA==", "mimeType": "image/png"}]
        }
    if name == "structured":
        return {"content": [], "structuredContent": {"a": [1, "é"]}}
    return {"content": []}


NAMES = (
    "echo",
    "pid",
    "slow",
    "die",
    "hang",
    "huge",
    "huge-line",
    "logs",
    "fails",
    "image",
    "structured",
    "nothing",
    "requests",
    "surrogate",
)


def tools(mode, cursor):
    names = [*NAMES, "echo"] if mode == "twice" else [] if mode == "none" else NAMES
    listed = [{"name": name, "description": f"It is {name}.", "inputSchema": {"type": "object"}} for name in names]
    if mode == "endless":
        return {"tools": listed[:1], "nextCursor": "again"}
    if mode == "pages" and cursor is None:
        return {"tools": listed[:2], "nextCursor": "2"}
    return {"tools": listed[2:] if mode == "pages" else listed}


def answer(mode, message):
    method, params = message["method"], message.get("params") or {}
    if method == "initialize":
        info = {"name": "hostile", "version": "1"}
        return {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return tools(mode, params.get("cursor"))
    return call(params["name"], params.get("arguments") or {}) if method == "tools/call" else None


def main(mode):
    if mode == "exits":
        print("Traceback ..\nModuleNotFoundError: No module named 'nothing'", file=sys.stderr, flush=True)
        sys.exit(1)
    if mode == "chatty":
        flood(sys.stdout, "hello, I am no MCP server\n")
    if mode == "mute":
        time.sleep(1000)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message or "method" not in message:
            continue
        result = answer(mode, message)
        if result is None:
            error = {"code": -32601, "message": f"no method {message['method']}"}
            send({"id": message["id"], "error": error})
        elif mode == "strange":
            send({"id": message["id"], "result": {"protocolVersion": "1066-10-14"}})
        else:
            send({"id": message["id"], "result": result})
    while mode == "stubborn":
        time.sleep(1000)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
