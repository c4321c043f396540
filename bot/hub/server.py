"""Running the Hub: in a thread of this process (tests, the demo), or as the process itself (`moerge hub`)."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import uvicorn

from bot.hub.access import Token
from bot.hub.app import application, open_hub
from bot.hub.faults import Faults, Log
from bot.hub.oidc import Publisher
from bot.hub.uploads import Limits
from bot.hub.web import Hub

HOST = "127.0.0.1"
_START_SECONDS = 20.0
_STOP_SECONDS = 2


class Server:
    """A Hub that is served. `log` holds the requests so far; `faults` may be set at any time, None for none.

    `faults(number, request)` is called for each request, numbered from 1, and may return a Fault.
    """

    def __init__(self, hub: Hub, listening: socket.socket, *, faults: Faults | None = None, access_log: bool = False):
        self.hub = hub
        self.root = hub.store.root
        self.log = Log()
        self.faults = faults
        self._socket = listening
        host, self.port = listening.getsockname()[:2]
        self.endpoint = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                application(hub, self.log, lambda: self.faults),
                http="h11",
                ws="none",
                lifespan="off",
                log_level="info" if access_log else "critical",
                access_log=access_log,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=_STOP_SECONDS,
            )
        )

    def token(self, name: str = "admin", rights: str = "admin", scope: Iterable[str] | None = None) -> str:
        """A token for the client. Without arguments the stored admin's; else a new one of these rights.

        `rights` is "admin", "write" or "read"; `scope` holds namespaces and repositories, and is the namespace `name`
        by default. A new token lives for a day and is known to every process that serves the same folder.
        Raises ValueError for rights or names there cannot be.
        """
        if (name, rights, scope) == ("admin", "admin", None):
            return self.hub.registry.admin().secret
        return self.hub.registry.mint(Token.of(name, rights, scope), 24 * 3600)

    def serve(self) -> None:
        """Serve until SIGINT or SIGTERM (in the main thread) or `stop`."""
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self.hub.jobs.stop()
            self._socket.close()

    def stop(self) -> None:
        """Ask the server to end; requests in flight have two seconds."""
        self.hub.jobs.stop()
        self._uvicorn.should_exit = True

    @property
    def started(self) -> bool:
        """Whether it answers."""
        return self._uvicorn.started


def prepare(
    root: Path,
    *,
    host: str = HOST,
    port: int = 0,
    tokens: Iterable[Token] = (),
    publishers: Iterable[Publisher] = (),
    jwks: Path | None = None,
    limits: Limits | None = None,
    faults: Faults | None = None,
    access_log: bool = False,
    jobs: bool = False,
) -> Server:
    """A server that listens and is not served yet. Port 0 takes a free one.

    Raises StoreError for a folder that cannot be used, OSError for an address that cannot be listened on.
    """
    hub = open_hub(root, tokens=tokens, publishers=publishers, jwks=jwks, limits=limits, jobs=jobs)
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    # asyncio sets this only on sockets that name their protocol, which accepted ones do not: without it each answer
    # waits 40 ms for an acknowledgement between its headers and its body. Accepted sockets take it over.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Server(hub, listening, faults=faults, access_log=access_log)


@contextlib.contextmanager
def running(
    root: Path,
    *,
    port: int = 0,
    tokens: Iterable[Token] = (),
    publishers: Iterable[Publisher] = (),
    jwks: Path | None = None,
    limits: Limits | None = None,
    faults: Faults | None = None,
    jobs: bool = False,
) -> Iterator[Server]:
    """A Hub on 127.0.0.1, served by a thread as long as the block lasts; the folder stays."""
    server = prepare(
        root, port=port, tokens=tokens, publishers=publishers, jwks=jwks, limits=limits, faults=faults, jobs=jobs
    )
    thread = threading.Thread(target=server.serve, name="hub", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the embedded Hub did not start")
            time.sleep(0.005)
        yield server
    finally:
        server.stop()
        thread.join(_STOP_SECONDS + 10)
