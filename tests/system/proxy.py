"""A reverse proxy: python proxy.py URL FILE serves URL under /teams/one/ray/ and writes its port to FILE.

The first WebSocket, which carries a job's log, is cut after its first messages, as proxies do with idle connections.
"""

import asyncio
import sys
from pathlib import Path

import aiohttp
from aiohttp import web

PREFIX = "/teams/one/ray"
CUT_AFTER = 3  # messages of the first WebSocket


async def forward(request: web.Request) -> web.StreamResponse:
    """Forward one request, or a WebSocket's messages."""
    target = request.app["url"] + str(request.rel_url).removeprefix(PREFIX)
    headers = {name: value for name, value in request.headers.items() if name == "Authorization"}
    session: aiohttp.ClientSession = request.app["session"]
    if request.headers.get("Upgrade", "").lower() == "websocket":
        request.app["opened"].append(target)
        socket, seen = web.WebSocketResponse(), 0
        await socket.prepare(request)
        async with session.ws_connect(target, headers=headers) as behind:
            async for message in behind:
                await socket.send_str(message.data)
                seen += 1
                if len(request.app["opened"]) == 1 and seen == CUT_AFTER:
                    request.transport.abort()
                    return socket
        await socket.close()
        return socket
    headers["Content-Type"] = request.headers.get("Content-Type", "")
    async with session.request(request.method, target, data=await request.read(), headers=headers) as answer:
        kept = {name: value for name, value in answer.headers.items() if name == "Content-Type"}
        return web.Response(status=answer.status, body=await answer.read(), headers=kept)


async def main(url: str, port: Path) -> None:
    """Serve until the process is told to end."""
    app = web.Application(client_max_size=2**30)
    app["url"], app["opened"], app["session"] = url, [], aiohttp.ClientSession()
    app.router.add_route("*", PREFIX + "/{path:.*}", forward)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port.write_text(str(site._server.sockets[0].getsockname()[1]))
    await asyncio.Event().wait()


asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
