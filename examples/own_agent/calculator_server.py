"""A calculator as an MCP server, over its standard input and output: python calculator_server.py"""

from mcp.server import MCPServer

server = MCPServer("calculator")


@server.tool()
def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


@server.tool()
def subtract(a: int, b: int) -> int:
    """The first number without the second."""
    return a - b


@server.tool()
def multiply(a: int, b: int) -> int:
    """The product of two numbers."""
    return a * b


if __name__ == "__main__":
    server.run()
