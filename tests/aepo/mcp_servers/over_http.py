"""An MCP server over streamable HTTP, of the SDK, on the port of its argument."""

import os
import sys

from mcp.server.mcpserver import MCPServer

server = MCPServer("network")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def pid() -> str:
    """The process."""
    return str(os.getpid())


@server.tool()
def huge(n: int) -> str:
    """Much."""
    return "x" * n


@server.tool()
async def hang() -> str:
    """Never returns."""
    import asyncio

    await asyncio.sleep(1000)
    return ""


if __name__ == "__main__":
    server.run("streamable-http", port=int(sys.argv[1]))
