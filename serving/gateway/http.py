"""The gateway's HTTP application: plain FastAPI over ports, so that it runs and is tested without Ray.

Chat completions in OpenAI's format, the models list, health, and what humans say about a request afterwards.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from rl_actors.contracts import BadInputError, InfrastructureError
from serving.gateway.openai_api import (
    SHOULD_RETRY,
    ApiError,
    ChatAnswer,
    ChatRequest,
    OutcomeRequest,
    OverrideRequest,
    completion_body,
    parse_chat_request,
    require_size,
    stream_events,
    validated,
)
from serving.gateway.ports import LivePorts, LiveRequest
from serving.gateway.request_origin import OriginGuard, trusted_names

Answering = Coroutine[Any, Any, ChatAnswer]

_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_ID_PREFIX: Final = "run-"
_LOOKS_PER_STALE_TIME: Final = 6


def build_app(ports: LivePorts, answer: Callable[[LiveRequest], Answering]) -> FastAPI:
    """Return the HTTP application over these ports; its lifespan watches the split, orphans and the critic's queue."""
    app = FastAPI(title="seatrial gateway", lifespan=_lifespan_of(ports), docs_url=None, redoc_url=None)
    chat, requests = ChatEndpoint(ports, answer), RequestEndpoints(ports)
    app.add_api_route("/v1/chat/completions", chat.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", chat.models, methods=["GET"])
    app.add_api_route("/healthz", chat.health, methods=["GET"], response_model=None)
    # /v1/runs is the name of older clients for the same paths.
    for path in ("/v1/requests/{request_id}", "/v1/runs/{request_id}"):
        app.add_api_route(path, requests.show, methods=["GET"])
        app.add_api_route(f"{path}/override", requests.override, methods=["POST"])
        app.add_api_route(f"{path}/outcome", requests.label, methods=["POST"])
    app.add_exception_handler(ApiError, _show_api_error)
    app.add_exception_handler(HTTPException, _show_http_error)
    app.add_exception_handler(Exception, _show_defect)
    app.add_middleware(OriginGuard, trusted=trusted_names(ports.config.allowed_hosts))
    return app


# --- endpoints --------------------------------------------------------------------------------------------------------
class ChatEndpoint:
    """Chat completions, the models list and the health of this gateway."""

    def __init__(self, ports: LivePorts, answer: Callable[[LiveRequest], Answering]) -> None:
        self._ports, self._answer = ports, answer
        self._book = AnswerBook(max_running=ports.config.max_concurrency)
        self._model = ports.workflow.name

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await read_body(request, self._ports.config.api.max_body_bytes)
        chat = parse_chat_request(body, self._ports.config.api, model=self._model)
        live = LiveRequest(request_id=request_key(request), session_key=session_key(request, chat), chat=chat)
        answer = await self._book.once(live.request_id, hashlib.sha256(body).hexdigest(), lambda: self._answer(live))
        if not chat.stream:
            return JSONResponse(completion_body(answer, model=self._model), headers=answer.headers)
        include_usage = chat.stream_options is not None and chat.stream_options.include_usage
        events = stream_events(answer, model=self._model, include_usage=include_usage)
        headers = answer.headers | {"cache-control": "no-cache"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def models(self) -> dict[str, Any]:
        """GET /v1/models: one model, the workflow."""
        # Which version answers is the router's choice, never the caller's.
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "seatrial"}
        return {"object": "list", "data": [model]}

    async def health(self) -> Response:
        """GET /healthz: 200 when a split is in force, else 503."""
        ports, epoch = self._ports, self._ports.splits.epoch
        body = {
            "status": "ok" if epoch else "no split in force",
            "gateway": ports.ledger.owner,
            "split_epoch": epoch,
            "running": self._book.num_running,
            "critic": {"scored": ports.critic.num_scored, "lost": ports.critic.num_lost},
            "traces_lost": ports.traces.num_lost,
        }
        return JSONResponse(body, status_code=200 if epoch else 503)


class RequestEndpoints:
    """The row of an answered request, a human override of it, a late outcome label.

    `request_id` is the row's `run_id`, as the x-seatrial-run-id header of the answer gives it.
    """

    def __init__(self, ports: LivePorts) -> None:
        self._ports = ports

    async def show(self, request_id: str) -> dict[str, Any]:
        """GET /v1/requests/{request_id}: the row, with every override and label."""
        ledger = self._ports.ledger
        record = await asyncio.to_thread(ledger.find, request_id.removeprefix(_ID_PREFIX))
        if record is None or record.run_id != request_id:
            raise _unknown(request_id)
        return asdict(record) | {"audit": list(await asyncio.to_thread(ledger.audit, request_id))}

    async def override(self, request_id: str, request: Request) -> dict[str, Any]:
        """POST /v1/requests/{request_id}/override."""
        body = validated(OverrideRequest, await self._read(request))
        await self._append(request_id, self._ports.ledger.override, body.model_dump())
        return {"run_id": request_id, "human_override": True}

    async def label(self, request_id: str, request: Request) -> dict[str, Any]:
        """POST /v1/requests/{request_id}/outcome: the latest label wins, earlier ones stay readable."""
        body = validated(OutcomeRequest, await self._read(request))
        success = "yes" if body.success else "no"
        await self._append(request_id, self._ports.ledger.label, body.model_dump() | {"success": success})
        return {"run_id": request_id, "success": success}

    async def _read(self, request: Request) -> bytes:
        return await read_body(request, self._ports.config.api.max_body_bytes)

    async def _append(self, request_id: str, append: Callable[..., None], fields: Mapping[str, Any]) -> None:
        try:
            await asyncio.to_thread(append, request_id, **fields, at=self._ports.clock())
        # The ledger's foreign key refuses a request that does not exist.
        except BadInputError as error:
            raise _unknown(request_id) from error


# --- idempotency ------------------------------------------------------------------------------------------------------
class AnswerBook:
    """Answers by idempotency key: at most `max_running` in flight, at most `capacity` remembered."""

    def __init__(self, *, max_running: int, capacity: int = 4096) -> None:
        # Oldest first; a task's name is the fingerprint of the body it answers. What another gateway or an earlier
        # process answered is known to the ledger only.
        self._tasks: dict[str, asyncio.Task[ChatAnswer]] = {}
        self._running: set[asyncio.Task[ChatAnswer]] = set()
        self._max_running, self._capacity = max_running, capacity

    @property
    def num_running(self) -> int:
        """Requests in flight, those whose client hung up included."""
        return len(self._running)

    async def once(self, key: str, fingerprint: str, answer: Callable[[], Answering]) -> ChatAnswer:
        """Return the answer of `key`, calling `answer` only when the key is new.

        Raises:
            ApiError: 409 the key is in flight; 422 it came with another body; 429 too many are. What `answer` raises.
        """
        task = self._tasks.get(key)
        if task is None:
            task = self._begin(key, fingerprint, answer)
        elif task.get_name() != fingerprint:
            message = "this idempotency key was used with another body; use a new key"
            raise ApiError(422, message, code="idempotency_key_reused", may_retry=False)
        elif not task.done():
            message = "a request with this idempotency key is in flight"
            raise ApiError(409, message, code="in_flight", may_retry=True)
        # A request goes on when its client hangs up: tools may have run, and the client will ask again with this key.
        return await asyncio.shield(task)

    def _begin(self, key: str, fingerprint: str, answer: Callable[[], Answering]) -> asyncio.Task[ChatAnswer]:
        if self.num_running >= self._max_running:
            message = f"{self.num_running} requests in flight, the limit; try again shortly"
            raise ApiError(429, message, code="rate_limit_exceeded", may_retry=True)
        task = asyncio.create_task(answer(), name=fingerprint)
        self._running.add(task)
        task.add_done_callback(lambda done: self._finish(key, done))
        self._tasks[key] = task
        self._evict()
        return task

    def _finish(self, key: str, task: asyncio.Task[ChatAnswer]) -> None:
        """Forget what may be tried again; keep answers, and failures after which a tool may not run twice."""
        self._running.discard(task)
        # Asking for the exception also keeps asyncio from complaining when nobody waits any more.
        error = None if task.cancelled() else task.exception()
        is_final = error is None or (isinstance(error, ApiError) and error.headers.get(SHOULD_RETRY) == "false")
        if task.cancelled() or not is_final:
            self._tasks.pop(key, None)

    def _evict(self) -> None:
        """Forget the oldest finished answers beyond the capacity; the ledger still refuses their keys."""
        for key in list(self._tasks):
            if len(self._tasks) <= self._capacity:
                return
            if self._tasks[key].done():
                del self._tasks[key]


# --- reading a request ------------------------------------------------------------------------------------------------
async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read at most `max_bytes`. Raises ApiError 413 as soon as more arrives."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        require_size(len(body), max_bytes)
    return bytes(body)


def request_key(request: Request) -> str:
    """Return the idempotency key of a request, or a new one. Raises ApiError 400 for one that no row can bear."""
    given = request.headers.get("idempotency-key") or request.headers.get("x-request-id")
    if given is None:
        return uuid.uuid4().hex
    if not _KEY.fullmatch(given):
        message = "use at most 128 letters, digits, '.', '_', ':', '-', starting with a letter or digit"
        raise ApiError(400, f"idempotency-key: {message}", code="invalid_value", param="idempotency-key")
    return given


def session_key(request: Request, chat: ChatRequest) -> str:
    """Return what a session sticks to: `user`, else x-session-key, else the start of the conversation."""
    given = chat.user or request.headers.get("x-session-key")
    if given:
        return given[:256]
    start = next(message.text for message in chat.messages if message.role == "user")
    # Hashed: the key is written to the ledger, which holds nothing of what a user said.
    return "start-" + hashlib.sha256(start.encode()).hexdigest()[:32]


# --- errors -----------------------------------------------------------------------------------------------------------
def _unknown(request_id: str) -> ApiError:
    return ApiError(404, f"no request {request_id!r}", code="run_not_found", param="run_id")


async def _show_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _show_http_error(request: Request, error: Exception) -> Response:
    """Put the framework's own refusals (no such path, wrong method) into the same shape."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _show_api_error(request, ApiError(error.status_code, message, code="not_found"))


async def _show_defect(request: Request, _: Exception) -> Response:
    """Answer a defect of ours with 500; nothing of it is shown."""
    # Not to be retried: tools may have run.
    return await _show_api_error(request, ApiError(500, "internal error", code="internal_error", may_retry=False))


# --- life -------------------------------------------------------------------------------------------------------------
def _lifespan_of(ports: LivePorts) -> Any:
    """Return FastAPI's lifespan: poll the split before the first request, then in the background."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        ports.splits.poll()
        work: tuple[Coroutine[Any, Any, None], ...] = (
            ports.splits.watch(ports.config.poll_s),
            watch_orphans(ports.end_orphans, ports.config.stale_after_s),
            ports.critic.work(),
        )
        tasks = [asyncio.create_task(each) for each in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Without a ledger the acknowledgement stays, and the next gateway ends our open requests.
            with suppress(InfrastructureError):
                ports.ledger.abort_orphans(ports.ledger.owner, at=ports.clock())
                ports.splits.leave()

    return lifespan


async def watch_orphans(end_orphans: Callable[[], int], stale_after_s: float) -> None:
    """Look for orphans until cancelled, six times while an acknowledgement goes stale."""
    # A gateway that is rescheduled at once finds its predecessor's word still fresh: only a later look can tell that
    # nobody stands behind it any more. A look reads one small file per gateway.
    while True:
        # A ledger that is locked or full now may be written at the next look.
        with suppress(InfrastructureError):
            await asyncio.to_thread(end_orphans)
        await asyncio.sleep(stale_after_s / _LOOKS_PER_STALE_TIME)
