"""Jobs: start one, look at it, follow its log, end it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bot.hub import errors, names
from bot.hub.jobs import Job
from bot.hub.web import caller, hub, route, with_json


def start(request: Request, body: dict[str, Any]) -> Response:
    """POST /api/jobs/{namespace}"""
    return JSONResponse(hub(request).jobs.start(_namespace(request), body).to_json())


def list_jobs(request: Request) -> Response:
    """GET /api/jobs/{namespace}"""
    return JSONResponse([job.to_json() for job in hub(request).jobs.all(_namespace(request))])


def inspect(request: Request) -> Response:
    """GET /api/jobs/{namespace}/{id}"""
    return JSONResponse(_job(request).to_json())


def logs(request: Request) -> Response:
    """GET /api/jobs/{namespace}/{id}/logs: server-sent events from the first line on, until the job ends"""
    return StreamingResponse(_events(_job(request)), media_type="text/event-stream")


def cancel(request: Request) -> Response:
    """POST /api/jobs/{namespace}/{id}/cancel"""
    job = _job(request)
    hub(request).jobs.cancel(job)
    return JSONResponse(job.to_json())


def no_schedule(request: Request) -> Response:
    """/api/scheduled-jobs/…"""
    raise errors.HubError(501, "The embedded Hub runs no jobs on a schedule.")


def routes() -> list[Route]:
    """The routes of this module, in the order in which they are to be tried."""
    one = "/api/jobs/{namespace:part}/{id:part}"
    return [
        route("/api/jobs/{namespace:part}", with_json(start), "POST"),
        route("/api/jobs/{namespace:part}", list_jobs),
        route(one, inspect),
        route(f"{one}/logs", logs),
        route(f"{one}/cancel", cancel, "POST"),
        route("/api/scheduled-jobs/{path:rest}", no_schedule, "GET", "POST", "PUT", "DELETE"),
    ]


def _namespace(request: Request) -> str:
    """The namespace that the path names, if the caller may run jobs in it. Raises HubError."""
    owner = names.namespace(request.path_params["namespace"])
    caller(request).check_namespace(owner)
    return owner


def _job(request: Request) -> Job:
    return hub(request).jobs.get(_namespace(request), request.path_params["id"])


def _events(job: Job) -> Iterator[str]:
    for event in job.events():
        if event is None:
            yield ": keep-alive\n\n"
        else:
            moment, line = event
            yield f"data: {json.dumps({'timestamp': moment.isoformat(), 'data': line})}\n\n"
