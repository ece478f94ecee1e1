"""The OpenAI-compatible border: what a client may send, what it gets back, and every error in one shape.

Source of the format: OpenAI chat completions; behaviour that openai-python relies on is listed in the README.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rl_actors.contracts import SeatrialError

if TYPE_CHECKING:
    from serving.contracts import RequestRecord
    from serving.store import ApiLimits

FinishReason = Literal["stop", "length", "content_filter"]
Body = TypeVar("Body", bound=BaseModel)

SHOULD_RETRY: Final = "x-should-retry"

# Parameters whose default changes nothing and is accepted; any other value would be a promise we cannot keep.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
}

_ERROR_TYPES: Final = {
    403: "permission_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}

_STAMPS: Final = ("model_version", "policy_version", "reward_model_version", "bundle_id", "release_channel", "run_id")


class ApiError(SeatrialError):
    """An answer that is not 200. `param` names what is wrong; `may_retry` says whether the same may be sent again."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, may_retry: bool | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.kind = _ERROR_TYPES.get(status, "invalid_request_error")
        # openai-python retries 409, 429 and 5xx by itself unless this header says no.
        self.headers = {} if may_retry is None else {SHOULD_RETRY: str(may_retry).lower()}
        if may_retry:
            self.headers["retry-after"] = "1"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def _require_unicode(text: str) -> None:
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("holds a lone surrogate, which no encoding can carry")


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ContentPart(_Closed):
    """A piece of a message; only text can be read."""

    type: Literal["text"]
    text: str


class ChatMessage(_Closed):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None

    @field_validator("content")
    @classmethod
    def _is_unicode(cls, content: str | list[ContentPart]) -> str | list[ContentPart]:
        _require_unicode(content if isinstance(content, str) else "".join(part.text for part in content))
        return content

    @property
    def text(self) -> str:
        """The message as plain text."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(_Closed):
    """`include_usage` adds OpenAI's last chunk without choices; usage is on the finishing chunk in any case."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Closed):
    """A parsed body. `metadata` may carry `task_id` and `intent` for reports; no gate reads them."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, min_length=1, max_length=256)
    temperature: float | None = Field(default=None, ge=0, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)

    @field_validator("metadata")
    @classmethod
    def _is_unicode(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        _require_unicode("".join(metadata.values()) if metadata else "")
        return metadata

    @property
    def prompt_messages(self) -> tuple[tuple[str, str], ...]:
        """The messages as (role, text) pairs of user and assistant."""
        # A client's system message is a user's text: authority over the prompt stays with the workflow.
        roles = ("assistant" if message.role == "assistant" else "user" for message in self.messages)
        return tuple(zip(roles, (message.text for message in self.messages), strict=True))

    @property
    def user_text(self) -> str:
        """The text of the user's messages, without anyone else's words."""
        return "\n".join(message.text for message in self.messages if message.role == "user")

    @property
    def token_cap(self) -> int | None:
        """The tokens a client allows each turn; None for no limit of its own."""
        return self.max_completion_tokens or self.max_tokens


class OverrideRequest(_Closed):
    """A human overrides the reply to a request."""

    actor: str = Field(min_length=1, max_length=256)
    reason: str = Field(min_length=1, max_length=2000)


class OutcomeRequest(OverrideRequest):
    """Someone says, maybe late, whether a request succeeded."""

    success: bool


def parse_chat_request(body: bytes, limits: ApiLimits, *, model: str) -> ChatRequest:
    """Read a body completely, or raise the ApiError (400, 404, 413) that names the parameter and the remedy."""
    # All of it before any work starts, so that an error never follows a 200.
    require_size(len(body), limits.max_body_bytes)
    request = validated(ChatRequest, _without_neutral(_json_object(body)))
    if request.model != model:
        message = f"model {request.model!r} does not exist; use {model!r} (see GET /v1/models)"
        raise ApiError(404, message, code="model_not_found", param="model")
    if len(request.messages) > limits.max_messages:
        message = f"{len(request.messages)} messages; at most {limits.max_messages}"
        raise ApiError(400, message, code="too_many_messages", param="messages")
    if sum(len(message.text) for message in request.messages) > limits.max_text_chars:
        message = f"messages hold over {limits.max_text_chars} characters; shorten them"
        raise ApiError(400, message, code="context_length_exceeded", param="messages")
    if not request.user_text.strip():
        raise ApiError(400, "no user message with text", code="invalid_value", param="messages")
    return request


def require_size(num_bytes: int, max_bytes: int) -> None:
    """Raise ApiError 413 for a body of more than `max_bytes`."""
    if num_bytes > max_bytes:
        raise ApiError(413, f"body over {max_bytes} bytes; send less", code="body_too_large")


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    # RecursionError: a body of nothing but brackets.
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def _without_neutral(value: dict[str, Any]) -> dict[str, Any]:
    """Drop parameters that ask for nothing special; refuse those that ask for what we do not do."""
    for name in value.keys() & _NEUTRAL.keys():
        if value[name] is not None and value[name] not in _NEUTRAL[name]:
            message = f"{name} = {value[name]!r} is not supported; leave it out"
            raise ApiError(400, message, code="unsupported_parameter", param=name)
    return {name: entry for name, entry in value.items() if name not in _NEUTRAL}


def validated(kind: type[Body], value: Mapping[str, Any] | bytes) -> Body:
    """Return a body as its model. Raises ApiError 400 that names the first parameter that does not fit."""
    try:
        return kind.model_validate_json(value) if isinstance(value, bytes) else kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        is_unknown = first["type"] == "extra_forbidden"
        code = "unknown_parameter" if is_unknown else "invalid_value"
        message = f"{param}: {'unknown parameter; leave it out' if is_unknown else first['msg']}"
        raise ApiError(400, message, code=code, param=param) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """A released reply and the row of its request. Token counts are over all model calls of the last attempt."""

    record: RequestRecord
    text: str
    finish_reason: FinishReason
    tokens_in: int
    tokens_out: int
    cached_tokens: int
    num_tool_calls: int

    @property
    def headers(self) -> dict[str, str]:
        """The version stamps; `x-should-retry: false` once tools ran."""
        stamps = {f"x-seatrial-{name.replace('_', '-')}": getattr(self.record, name) for name in _STAMPS}
        return stamps | ({SHOULD_RETRY: "false"} if self.num_tool_calls else {})

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.tokens_in,
            "completion_tokens": self.tokens_out,
            "total_tokens": self.tokens_in + self.tokens_out,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def completion_body(answer: ChatAnswer, *, model: str) -> dict[str, Any]:
    """Return the body of a request that does not stream."""
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    return _frame(answer, model, "chat.completion") | {"choices": [choice], "usage": answer.usage}


def stream_events(answer: ChatAnswer, *, model: str, include_usage: bool) -> Iterator[str]:
    """Yield the server-sent events of a reply that was already released as a whole, `data: [DONE]` last."""
    frame = _frame(answer, model, "chat.completion.chunk")

    def event(delta: Mapping[str, str], finish_reason: FinishReason | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _event(frame | {"choices": [choice]} | more)

    yield event({"role": "assistant", "content": ""})
    # One chunk a word, its space with it: joined, the chunks give the text again.
    for piece in re.split(r"(?<= )", answer.text) if answer.text else ():
        yield event({"content": piece})
    yield event({}, answer.finish_reason, usage=answer.usage)
    if include_usage:
        yield _event(frame | {"choices": [], "usage": answer.usage})
    yield "data: [DONE]\n\n"


def _frame(answer: ChatAnswer, model: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answer.record.run_id}",
        "object": kind,
        "created": int(answer.record.started_at),
        "model": model,
        "system_fingerprint": answer.record.policy_version,
    }


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
