"""The gateway's HTTP application: plain FastAPI over ports, so that it runs and is tested without Ray.

Chat completions in OpenAI's format, the models list, health, and what humans say about a run afterwards.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from rl_actors.contracts import BadInputError, InfrastructureError
from serving.gateway.answer import LiveRuns
from serving.gateway.answer_book import AnswerBook
from serving.gateway.openai_api import (
    ApiError,
    ChatAnswer,
    ChatRequest,
    OutcomeRequest,
    OverrideRequest,
    completion_body,
    parse_chat_request,
    stream_events,
)
from serving.gateway.orphans import watch_orphans
from serving.gateway.ports import LivePorts, LiveRequest
from serving.gateway.request_origin import OriginGuard, trusted_names

_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


_RUN_PREFIX: Final = "run-"


Body = TypeVar("Body", bound=BaseModel)


def build_app(ports: LivePorts) -> FastAPI:
    """Return the HTTP application over these ports; its lifespan watches the split, orphans and the critic's queue."""
    app = FastAPI(title="seatrial gateway", lifespan=_lifespan_of(ports), docs_url=None, redoc_url=None)
    chat = ChatEndpoint(ports)
    runs = RunEndpoints(ports)
    app.add_api_route("/v1/chat/completions", chat.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", chat.models, methods=["GET"])
    app.add_api_route("/v1/runs/{run_id}", runs.show, methods=["GET"])
    app.add_api_route("/v1/runs/{run_id}/override", runs.override, methods=["POST"])
    app.add_api_route("/v1/runs/{run_id}/outcome", runs.label, methods=["POST"])
    app.add_api_route("/healthz", chat.health, methods=["GET"], response_model=None)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_defect)
    app.add_middleware(OriginGuard, trusted=trusted_names(ports.config.allowed_hosts))
    return app


class ChatEndpoint:
    """Chat completions, the models list and the health of this gateway."""

    def __init__(self, ports: LivePorts) -> None:
        """Hold the ports and an empty answer book."""
        self._ports, self._runs = ports, LiveRuns(ports)
        self._book = AnswerBook(max_running=ports.config.max_concurrency)
        self._model = ports.workflow.name

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await read_body(request, self._ports.config.api.max_body_bytes)
        chat = parse_chat_request(body, self._ports.config.api, model=self._model)
        live = self._live_request(request, chat)
        fingerprint = hashlib.sha256(body).hexdigest()
        answer = await self._book.once(live.request_id, fingerprint, lambda: self._runs.answer(live))
        return self._response(answer, chat)

    async def models(self) -> dict[str, Any]:
        """GET /v1/models: one model, the workflow; which version answers is the router's choice, never the caller's."""
        return {
            "object": "list",
            "data": [{"id": self._model, "object": "model", "created": 0, "owned_by": "seatrial"}],
        }

    async def health(self) -> Response:
        """GET /healthz: 200 when a split is in force, else 503."""
        epoch, critic = self._ports.splits.epoch, self._ports.critic
        body = {
            "status": "ok" if epoch else "no split in force",
            "gateway": self._ports.owner,
            "split_epoch": epoch,
            "running": self._book.num_running,
            "critic": {"scored": critic.num_scored, "lost": critic.num_lost},
            "traces_lost": self._ports.traces.num_lost,
        }
        return JSONResponse(body, status_code=200 if epoch else 503)

    def _live_request(self, request: Request, chat: ChatRequest) -> LiveRequest:
        metadata = chat.metadata or {}
        intent = metadata.get("intent", "")
        return LiveRequest(
            request_id=request_key(request),
            session_key=session_key(request, chat),
            messages=tuple((_prompt_role(message.role), message.text) for message in chat.messages),
            user_text=chat.user_text,
            temperature=chat.temperature,
            seed=chat.seed,
            token_cap=chat.token_cap,
            intent=intent if intent in self._ports.workflow.intents else "unknown",
            task_id=metadata.get("task_id", "")[:256],
        )

    def _response(self, answer: ChatAnswer, chat: ChatRequest) -> Response:
        if not chat.stream:
            return JSONResponse(completion_body(answer, model=self._model), headers=answer.headers)
        include_usage = chat.stream_options is not None and chat.stream_options.include_usage
        events = stream_events(answer, model=self._model, include_usage=include_usage)
        headers = answer.headers | {"cache-control": "no-cache"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)


class RunEndpoints:
    """What may be asked and said about a run: its row, a human override, a late outcome label."""

    def __init__(self, ports: LivePorts) -> None:
        """Hold the ports."""
        self._ports = ports

    async def show(self, run_id: str) -> dict[str, Any]:
        """GET /v1/runs/{run_id}: the row, with every override and label."""
        ledger = self._ports.ledger
        record = await asyncio.to_thread(ledger.find, run_id.removeprefix(_RUN_PREFIX))
        if record is None or record.run_id != run_id:
            raise _no_such_run(run_id)
        return asdict(record) | {"audit": list(await asyncio.to_thread(ledger.audit, run_id))}

    async def override(self, run_id: str, request: Request) -> dict[str, Any]:
        """POST /v1/runs/{run_id}/override."""
        body = await self._parse(request, OverrideRequest)
        at = self._ports.clock()
        await self._write(run_id, self._ports.ledger.override, actor=body.actor, reason=body.reason, at=at)
        return {"run_id": run_id, "human_override": True}

    async def label(self, run_id: str, request: Request) -> dict[str, Any]:
        """POST /v1/runs/{run_id}/outcome: the latest label wins, earlier ones stay readable."""
        body = await self._parse(request, OutcomeRequest)
        success, at = "yes" if body.success else "no", self._ports.clock()
        await self._write(
            run_id, self._ports.ledger.label, success=success, actor=body.actor, reason=body.reason, at=at
        )
        return {"run_id": run_id, "success": success}

    async def _parse(self, request: Request, kind: type[Body]) -> Body:
        body = await read_body(request, self._ports.config.api.max_body_bytes)
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            param = ".".join(str(part) for part in first["loc"]) or None
            raise ApiError(400, f"{param}: {first['msg']}", code="invalid_value", param=param) from error

    async def _write(self, run_id: str, write: Callable[..., None], **fields: Any) -> None:
        """Append beside a run; the ledger's foreign key refuses a run that does not exist."""
        try:
            await asyncio.to_thread(write, run_id, **fields)
        except BadInputError as error:
            raise _no_such_run(run_id) from error


# --- reading a request ------------------------------------------------------------------------------------------------
async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read at most `max_bytes`. Raises ApiError 413 as soon as more arrives."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise ApiError(413, f"body over {max_bytes} bytes; send less", code="body_too_large")
        chunks.append(chunk)
    return b"".join(chunks)


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
    return "start-" + hashlib.sha256(start.encode()).hexdigest()[:32]


def _prompt_role(role: str) -> str:
    """A client's system message is a user's text: authority over the prompt stays with the workflow."""
    return "assistant" if role == "assistant" else "user"


def _no_such_run(run_id: str) -> ApiError:
    return ApiError(404, f"no run {run_id!r}", code="run_not_found", param="run_id")


# --- errors -----------------------------------------------------------------------------------------------------------
async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Put the framework's own refusals (no such path, wrong method) into the same shape."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _on_api_error(request, ApiError(error.status_code, message, code="not_found"))


async def _on_defect(request: Request, _: Exception) -> Response:
    """A defect of ours: nothing of it is shown, and it is not retried, because tools may have run."""
    error = ApiError(
        500, "internal error", code="internal_error", kind="server_error", headers={"x-should-retry": "false"}
    )
    return await _on_api_error(request, error)


# --- life -------------------------------------------------------------------------------------------------------------
def _lifespan_of(ports: LivePorts) -> Any:
    """Return FastAPI's lifespan: poll the split before the first request, then in the background."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        ports.splits.poll()
        tasks = [
            asyncio.create_task(ports.splits.watch(ports.config.poll_s)),
            asyncio.create_task(watch_orphans(ports.ledger, ports.config, ports.clock)),
            asyncio.create_task(ports.critic.work()),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Without a ledger the acknowledgement stays, and the next gateway ends our open runs.
            with suppress(InfrastructureError):
                ports.ledger.abort_orphans(ports.owner, at=ports.clock())
                ports.splits.leave()

    return lifespan
