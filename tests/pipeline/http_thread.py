"""Run an HTTP server for tests in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from aiohttp import web


@contextlib.contextmanager
def serve(app: web.Application) -> Iterator[str]:
    """Serve an application on a free port of this machine, and yield its address."""
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    runner = web.AppRunner(app, access_log=None)

    async def run() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    if not ready.wait(30):
        raise TimeoutError("the server did not start within 30 s")
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
