"""Reading a request: body cap, idempotency key, session key."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from fastapi import Request

from serving.gateway.http import read_body, request_key, session_key
from serving.gateway.openai_api import ApiError, ChatRequest
from tests.serving.gateway.live_fakes import body


def request_of(chunks: Sequence[bytes] = (), **headers: str) -> Request:
    """A request that arrives in these chunks."""
    waiting = list(chunks)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "headers": [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()],
    }

    async def receive() -> dict[str, Any]:
        chunk = waiting.pop(0) if waiting else b""
        return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}

    return Request(scope, receive)


def chat(**changes: Any) -> ChatRequest:
    return ChatRequest.model_validate(body(**changes))


class TestBody:
    @pytest.mark.parametrize("chunks", [[b"abc", b"def"], [b"abcdef"], [b"", b"abcdef", b""]])
    def test_chunks_are_joined(self, chunks: list[bytes]) -> None:
        assert asyncio.run(read_body(request_of(chunks), 6)) == b"abcdef"

    def test_stops_reading_as_soon_as_it_is_too_much(self) -> None:
        request = request_of([b"x" * 4] * 1_000)
        with pytest.raises(ApiError) as caught:
            asyncio.run(read_body(request, 10))
        assert caught.value.status == 413

    def test_empty(self) -> None:
        assert asyncio.run(read_body(request_of(), 10)) == b""


class TestKey:
    @pytest.mark.parametrize("key", ["a", "stainless-python-retry-4b9e", "r1.support_desk.live.7-3", "x" * 128])
    def test_good_keys_are_taken_as_they_are(self, key: str) -> None:
        assert request_key(request_of(idempotency_key=key)) == key

    def test_idempotency_key_wins(self) -> None:
        assert request_key(request_of(idempotency_key="a", x_request_id="b")) == "a"

    @pytest.mark.parametrize("key", ["~", "a~2", "a/b", "a b", "x" * 129, "é", ".a", "a\tb"])
    def test_bad_keys(self, key: str) -> None:
        """The tilde numbers our own attempts; a client that could write it could claim another's row."""
        with pytest.raises(ApiError) as caught:
            request_key(request_of(idempotency_key=key))
        assert caught.value.status == 400

    def test_without_one_each_request_is_its_own(self) -> None:
        assert len({request_key(request_of()) for _ in range(50)}) == 50


class TestSession:
    def test_user_then_header_then_start(self) -> None:
        assert session_key(request_of(x_session_key="h"), chat(user="u")) == "u"
        assert session_key(request_of(x_session_key="h"), chat()) == "h"
        assert session_key(request_of(), chat()).startswith("start-")

    def test_start_is_the_first_user_message(self) -> None:
        first = {"role": "user", "content": "hello"}
        more = [first, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
        led = [{"role": "system", "content": "s"}, first]
        keys = {session_key(request_of(), chat(messages=messages)) for messages in ([first], more, led)}
        assert len(keys) == 1

    def test_other_starts_are_other_sessions(self) -> None:
        messages = [[{"role": "user", "content": text}] for text in ("a", "b", "A", "a ")]
        assert len({session_key(request_of(), chat(messages=each)) for each in messages}) == 4

    def test_long_header_is_cut_not_refused(self) -> None:
        assert len(session_key(request_of(x_session_key="x" * 5_000), chat())) == 256

    def test_message_text_is_not_in_the_key(self) -> None:
        """The key is written to the ledger: it must not carry what the user said."""
        assert "secret" not in session_key(request_of(), chat(messages=[{"role": "user", "content": "secret"}]))
