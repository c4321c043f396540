"""A build's cards as pages on this machine; they load themselves again when the report or a template changes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from cards.page import card_page
from cards.render import GGUF_FOLDER, MODEL_FOLDER, TEMPLATES, render_gguf_card, render_model_card, write_cards
from evals.results import REPORT, Report, read_report

# A page may load its own style, script and images, and nothing from elsewhere.
POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def application(folder: Path) -> Any:
    """The server's application for a build's folder: `/`, `/gguf`, `/version`, and the files beside the card."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route

    def page(request: Request) -> Response:
        gguf = request.url.path == f"/{GGUF_FOLDER}"
        try:
            report = read_report(folder / REPORT)
            write_cards(folder, report)
            text = render_gguf_card(report) if gguf else render_model_card(report)
        except Exception as error:  # a template under the hands of its author may fail in any way: it is shown
            text = f"# This card cannot be rendered\n\n```text\n{type(error).__name__}: {error}\n```\n"
            report = None
        tabs = _tabs(report)
        name = _name(report, gguf) if report else str(folder)
        shown = card_page(text, name, tabs, "GGUF" if gguf else "Model card", version(folder), "/files/")
        return HTMLResponse(shown, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})

    def current(request: Request) -> Response:
        return PlainTextResponse(version(folder), headers={"Cache-Control": "no-store"})

    def file(request: Request) -> Response:
        root = (folder / MODEL_FOLDER).resolve()
        path = (root / request.path_params["path"]).resolve()
        if (
            not path.is_relative_to(root)
            or path.suffix not in (".svg", ".png", ".jpg", ".gif", ".webp")
            or not path.is_file()
        ):
            return PlainTextResponse("not here", 404)
        return FileResponse(path, headers={"Cache-Control": "no-store"})

    return Starlette(
        routes=[
            Route("/", page),
            Route(f"/{GGUF_FOLDER}", page),
            Route("/version", current),
            Route("/files/{path:path}", file),
        ]
    )


def version(folder: Path) -> str:
    """A hash that changes with the report and with the templates."""
    digest = hashlib.sha256()
    for path in (folder / REPORT, *sorted(TEMPLATES.rglob("*.j2"))):
        try:
            stat = path.stat()
            digest.update(f"{path} {stat.st_mtime_ns} {stat.st_size}\n".encode())
        except OSError:
            digest.update(f"{path} is not there\n".encode())
    return digest.hexdigest()[:16]


def serve(folder: Path, port: int) -> None:
    """Serve the pages on 127.0.0.1 until interrupted. Port 0 takes a free one."""
    import socket

    import uvicorn

    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen()
        print(f"http://127.0.0.1:{listening.getsockname()[1]}  (Ctrl+C ends it)", flush=True)
        server = uvicorn.Server(uvicorn.Config(application(folder), log_level="warning"))
        server.run(sockets=[listening])


def _tabs(report: Report | None) -> dict[str, str]:
    return {"Model card": "/"} | ({"GGUF": f"/{GGUF_FOLDER}"} if report and report.quants else {})


def _name(report: Report, gguf: bool) -> str:
    name = report.repo or report.name
    return f"{name}-GGUF" if gguf else name
