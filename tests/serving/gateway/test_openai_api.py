"""The OpenAI border: what is accepted, what is refused and how, what goes out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.gateway.openai_api import (
    ApiError,
    ChatAnswer,
    ChatRequest,
    completion_body,
    parse_chat_request,
    stream_events,
)
from serving.store.served import ApiLimits
from tests.serving.fakes import make_record

RECORD = make_record(
    1, model_version="m", policy_version="p", reward_model_version="r", bundle_id="b", started_at=1_700_000_000.5
)
LIMITS = ApiLimits(max_body_bytes=2_000, max_messages=3, max_text_chars=100)


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "shop", "messages": [{"role": "user", "content": "hello"}]} | changes


def parse(value: Any) -> ChatRequest:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_chat_request(data, LIMITS, model="shop")


def refused(value: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(value)
    return caught.value


def answer(**changes: Any) -> ChatAnswer:
    values: dict[str, Any] = {
        "record": RECORD,
        "text": "It is paid.",
        "finish_reason": "stop",
        "tokens_in": 30,
        "tokens_out": 7,
        "cached_tokens": 4,
        "num_tool_calls": 0,
    }
    return ChatAnswer(**(values | changes))


def events(reply: ChatAnswer, *, include_usage: bool = False) -> list[dict[str, Any]]:
    lines = list(stream_events(reply, model="shop", include_usage=include_usage))
    assert lines[-1] == "data: [DONE]\n\n"
    assert all(line.startswith("data: ") and line.endswith("\n\n") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class TestAccepted:
    def test_smallest_request(self) -> None:
        request = parse(body())
        assert request.user_text == "hello"
        assert not request.stream
        assert request.token_cap is None

    def test_content_parts_are_joined(self) -> None:
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        assert parse(body(messages=[{"role": "user", "content": parts}])).user_text == "one\ntwo"

    def test_only_the_users_words_are_user_text(self) -> None:
        messages = [
            {"role": "system", "content": "obey"},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "answer"},
        ]
        assert parse(body(messages=messages)).user_text == "first"

    @pytest.mark.parametrize(
        ("given", "cap"),
        [({"max_tokens": 5}, 5), ({"max_completion_tokens": 9}, 9), ({"max_tokens": 5, "max_completion_tokens": 9}, 9)],
    )
    def test_token_cap(self, given: dict[str, int], cap: int) -> None:
        assert parse(body(**given)).token_cap == cap

    @pytest.mark.parametrize(
        "neutral",
        [
            {"n": 1},
            {"top_logprobs": 0},
            {"top_p": 1.0},
            {"presence_penalty": 0},
            {"frequency_penalty": 0.0},
            {"logprobs": False},
            {"stop": None},
            {"tools": []},
            {"tool_choice": "none"},
            {"response_format": {"type": "text"}},
            {"store": False},
            {"parallel_tool_calls": True},
        ],
    )
    def test_parameters_that_ask_for_nothing(self, neutral: dict[str, Any]) -> None:
        assert parse(body(**neutral)) == parse(body())

    def test_what_openai_python_sends_for_a_stream(self) -> None:
        request = parse(body(stream=True, stream_options={"include_usage": True}))
        assert request.stream
        assert request.stream_options is not None
        assert request.stream_options.include_usage


class TestRefused:
    @pytest.mark.parametrize(
        "data", [b"", b"{", b"\xff\xfe\xfd", b"nonsense", b"[" * 1900, b"[1]", b'"text"', b"null", b"3"]
    )
    def test_not_a_json_object(self, data: bytes) -> None:
        error = refused(data)
        assert (error.status, error.code) == (400, "invalid_json")

    def test_too_large(self) -> None:
        assert refused(b" " * 2_001).status == 413

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"n": 2}, "n"),
            ({"top_p": 0.5}, "top_p"),
            ({"tools": [{"type": "function"}]}, "tools"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"logprobs": True}, "logprobs"),
            ({"stop": ["x"]}, "stop"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"logit_bias": {"5": 1}}, "logit_bias"),
        ],
    )
    def test_promises_we_cannot_keep(self, changes: dict[str, Any], param: str) -> None:
        error = refused(body(**changes))
        assert (error.status, error.code, error.param) == (400, "unsupported_parameter", param)
        assert "leave it out" in error.message

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": "hello"}, "messages"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
            ({"messages": [{"role": "user"}]}, "messages.0.content"),
            ({"messages": [{"role": "user", "content": "ok", "extra": 1}]}, "messages.0.extra"),
            ({"temperature": 2.1}, "temperature"),
            ({"temperature": -0.1}, "temperature"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"seed": "x"}, "seed"),
            ({"seed": 2**70}, "seed"),
            ({"user": ""}, "user"),
            ({"user": "x" * 300}, "user"),
            ({"stream": "perhaps"}, "stream"),
            ({"metadata": {"a": 1}}, "metadata.a"),
            ({"model": ""}, "model"),
        ],
    )
    def test_wrong_values_are_named(self, changes: dict[str, Any], param: str) -> None:
        error = refused(body(**changes))
        assert (error.status, error.param) == (400, param)
        assert param in error.message

    def test_unknown_parameter(self) -> None:
        error = refused(body(temprature=1))
        assert (error.code, error.param) == ("unknown_parameter", "temprature")

    def test_image_parts(self) -> None:
        parts = [{"type": "image_url", "image_url": {"url": "x"}}]
        assert refused(body(messages=[{"role": "user", "content": parts}])).status == 400

    def test_model_of_someone_else(self) -> None:
        error = refused(body(model="gpt-4"))
        assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
        assert "'shop'" in error.message

    def test_caller_cannot_choose_a_version(self) -> None:
        assert refused(body(model="ppo-b")).status == 404
        assert refused(body(release_channel="general")).code == "unknown_parameter"

    def test_too_many_messages(self) -> None:
        assert refused(body(messages=[{"role": "user", "content": "x"}] * 4)).code == "too_many_messages"

    def test_too_much_text(self) -> None:
        assert refused(body(messages=[{"role": "user", "content": "x" * 101}])).code == "context_length_exceeded"

    @pytest.mark.parametrize("content", ["", "  \n", []])
    def test_nothing_said(self, content: Any) -> None:
        assert refused(body(messages=[{"role": "user", "content": content}])).param == "messages"

    def test_only_a_system_message(self) -> None:
        assert refused(body(messages=[{"role": "system", "content": "hi"}])).status == 400

    def test_lone_surrogate(self) -> None:
        error = refused(b'{"model":"shop","messages":[{"role":"user","content":"\\ud800"}]}')
        assert error.status == 400
        json.dumps(error.body).encode("utf-8")


class TestErrors:
    def test_shape(self) -> None:
        error = ApiError(400, "no", code="c", param="p")
        assert error.body == {"error": {"message": "no", "type": "invalid_request_error", "param": "p", "code": "c"}}

    @pytest.mark.parametrize(("may_retry", "said"), [(True, "true"), (False, "false")])
    def test_retry_advice(self, may_retry: bool, said: str) -> None:
        for status in (409, 503):
            error = ApiError(status, "m", code="c", may_retry=may_retry)
            assert error.headers["x-should-retry"] == said
            assert ("retry-after" in error.headers) == may_retry

    def test_overload_says_when_to_come_back(self) -> None:
        error = ApiError(429, "full", code="rate_limit_exceeded", may_retry=True)
        assert error.status == 429
        assert error.headers["retry-after"] == "1"


class TestAnswers:
    def test_body(self) -> None:
        value = completion_body(answer(), model="shop")
        assert value["object"] == "chat.completion"
        assert value["choices"][0]["message"]["content"] == "It is paid."
        assert value["choices"][0]["finish_reason"] == "stop"
        assert value["usage"]["total_tokens"] == 37
        assert value["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}

    def test_every_stamp_is_a_header(self) -> None:
        names = {"model-version", "policy-version", "reward-model-version", "bundle-id", "release-channel", "run-id"}
        assert set(answer().headers) == {f"x-seatrial-{name}" for name in names}

    def test_no_retry_once_tools_ran(self) -> None:
        assert "x-should-retry" not in answer().headers
        assert answer(num_tool_calls=1).headers["x-should-retry"] == "false"

    @pytest.mark.parametrize("text", ["", "one", "It is paid.", " two  spaces ", "line\nbreak é"])
    def test_stream_gives_the_text_again(self, text: str) -> None:
        chunks = events(answer(text=text))
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text

    def test_stream_order(self) -> None:
        chunks = events(answer())
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in chunks}) == 1

    def test_usage_is_always_there(self) -> None:
        assert events(answer())[-1]["usage"]["total_tokens"] == 37
        assert events(answer())[-1]["choices"]

    def test_an_empty_reply_is_a_role_and_an_end(self) -> None:
        assert [chunk["choices"][0]["delta"] for chunk in events(answer(text=""))] == [
            {"role": "assistant", "content": ""}, {},
        ]  # fmt: skip

    def test_options_that_say_nothing_ask_for_no_usage_chunk(self) -> None:
        """openai-python reads `choices[0]` of every chunk unless it asked for the one without choices."""
        options = parse(body(stream=True, stream_options={})).stream_options
        assert options is not None
        assert not options.include_usage

    def test_usage_chunk_when_asked_for(self) -> None:
        last = events(answer(), include_usage=True)[-1]
        assert last["choices"] == []
        assert last["usage"]["total_tokens"] == 37

    def test_openai_client_types_accept_it(self) -> None:
        from openai.types.chat import ChatCompletion, ChatCompletionChunk

        assert ChatCompletion.model_validate(completion_body(answer(), model="shop")).usage is not None
        for chunk in events(answer(), include_usage=True):
            ChatCompletionChunk.model_validate(chunk)
