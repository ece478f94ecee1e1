"""The HTTP border at its bounds: the last body taken, the first refused, and input that no file or header bears."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.contracts.errors import BadInputError
from serving.gateway.http import read_body, request_key, session_key
from serving.gateway.openai_api import ApiError, ChatRequest, parse_chat_request
from serving.store.served import ApiLimits
from tests.serving.gateway.live_fakes import HELLO, PAY, STABLE, Rig, body, make_policy, make_rig
from tests.serving.gateway.test_http_parts import request_of

CHAT = "/v1/chat/completions"
LIMITS = ApiLimits(max_body_bytes=4_000, max_messages=3, max_text_chars=100)
SURROGATE = "\\ud800"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def parse(value: Mapping[str, Any] | bytes, limits: ApiLimits = LIMITS) -> ChatRequest:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_chat_request(data, limits, model="shop")


def refused(value: Mapping[str, Any] | bytes, limits: ApiLimits = LIMITS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(value, limits)
    return caught.value


def talk(rig: Rig, conversation: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with rig.client() as client:
            return await asyncio.wait_for(conversation(client), 20.0)

    return asyncio.run(run())


def send(rig: Rig, data: bytes, path: str = CHAT, **headers: str) -> httpx.Response:
    sent = {"content-type": "application/json"} | headers
    return talk(rig, lambda client: client.post(path, content=data, headers=sent))


class TestSizes:
    def test_a_body_of_exactly_the_limit_is_read(self):
        data = json.dumps(body("hi")).encode()
        data += b" " * (4_000 - len(data))
        assert parse(data).user_text == "hi"
        assert refused(data + b" ").status == 413
        assert asyncio.run(read_body(request_of([data[:3_000], data[3_000:]]), 4_000)) == data

    def test_a_body_that_never_ends_is_not_collected(self):
        """What was read past the limit is one chunk at most, whatever the client says about its length."""
        taken: list[int] = []

        async def receive() -> dict[str, Any]:
            taken.append(1)
            return {"type": "http.request", "body": b"x" * 100, "more_body": True}

        request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
        with pytest.raises(ApiError, match="body over 250 bytes"):
            asyncio.run(read_body(request, 250))
        assert len(taken) == 3

    def test_the_last_message_and_the_last_character_are_taken(self):
        assert len(parse(body(messages=[user("x")] * 3)).messages) == 3
        assert parse(body("x" * 100)).user_text == "x" * 100
        error = refused(body(messages=[user("x" * 60), {"role": "assistant", "content": "y" * 41}]))
        assert (error.code, error.param) == ("context_length_exceeded", "messages")

    def test_text_is_counted_in_characters_of_all_parts(self):
        parts = [{"type": "text", "text": "ü" * 49}, {"type": "text", "text": "💚" * 50}]
        assert len(parse(body(messages=[user(parts)])).user_text) == 100
        parts[0]["text"] += "ü"
        assert refused(body(messages=[user(parts)])).code == "context_length_exceeded"

    @pytest.mark.parametrize(("num_entries", "is_taken"), [(16, True), (17, False)])
    def test_metadata_has_openai_s_bound(self, num_entries: int, is_taken: bool):
        value = body(metadata={f"key-{i}": "v" for i in range(num_entries)})
        if is_taken:
            assert len(parse(value).metadata or {}) == 16
        else:
            assert refused(value).param == "metadata"

    @pytest.mark.parametrize("path", ["override", "outcome"])
    def test_what_is_said_about_a_run_is_bounded_too(self, tmp_path: Path, path: str):
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        said: dict[str, Any] = {"actor": "ann", "reason": "r"} | ({"success": False} if path == "outcome" else {})

        async def say(client: httpx.AsyncClient) -> list[int]:
            run_id = (await client.post(CHAT, json=body())).headers["x-seatrial-run-id"]
            reasons = ("r" * 2000, "r" * 2001, "r" * 30_000)
            answers = [await client.post(f"/v1/requests/{run_id}/{path}", json=said | {"reason": r}) for r in reasons]
            return [answer.status_code for answer in answers]

        assert talk(rig, say) == [200, 400, 413]
        assert len(rig.ledger.audit(rig.rows()[0].run_id)) == 1

    @pytest.mark.parametrize(
        ("changes", "is_taken"),
        [
            ({"temperature": 0}, True), ({"temperature": 2}, True), ({"temperature": 2.000001}, False),
            ({"seed": -(2**63)}, True), ({"seed": 2**63 - 1}, True), ({"seed": 2**63}, False),
            ({"max_tokens": 1}, True), ({"max_completion_tokens": 0}, False),
            ({"user": "u" * 256}, True), ({"user": "u" * 257}, False), ({"user": None}, True),
        ],
    )  # fmt: skip
    def test_numbers_at_their_bounds(self, changes: dict[str, Any], is_taken: bool):
        if is_taken:
            assert parse(body(**changes))
        else:
            assert refused(body(**changes)).param == next(iter(changes))


class TestWords:
    @pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5_000])
    @pytest.mark.parametrize("name", ["temperature", "seed", "max_tokens"])
    def test_numbers_that_are_none_are_refused(self, name: str, value: str):
        """Python's JSON reads NaN and Infinity: neither may reach a sampler."""
        error = refused(
            f'{{"model":"shop","messages":[{{"role":"user","content":"x"}}],"{name}":{value}}}'.encode(), ApiLimits()
        )
        assert error.status == 400

    @pytest.mark.parametrize(
        "field",
        [
            f'"user":"{SURROGATE}"', f'"metadata":{{"task_id":"{SURROGATE}"}}',
            f'"metadata":{{"intent":"a{SURROGATE}"}}',
            f'"metadata":{{"{SURROGATE}":1}}', f'"{SURROGATE}":1', f'"stop":"{SURROGATE}"', f'"n":"{SURROGATE}"',
            f'"messages":[{{"role":"{SURROGATE}","content":"x"}}]', f'"model":"{SURROGATE}"',
            f'"messages":[{{"role":"user","content":[{{"type":"text","text":"{SURROGATE}"}}]}}]',
        ],
    )  # fmt: skip
    def test_half_a_character_anywhere_is_bad_input_not_a_defect(self, tmp_path: Path, field: str):
        """No UTF-8 carries a lone surrogate: neither the ledger, nor the response that complains about it."""
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        response = send(rig, f'{{"model":"shop","messages":[{{"role":"user","content":"x"}}],{field}}}'.encode())
        assert response.status_code in {400, 404}
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert rig.rows() == []

    def test_both_halves_are_a_character(self, tmp_path: Path):
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        data = rb'{"model":"shop","messages":[{"role":"user","content":"x"}],"metadata":{"task_id":"\ud83d\udc9a"}}'
        assert send(rig, data).status_code == 200
        assert rig.rows()[0].task_id == "💚"

    def test_a_task_id_is_cut_where_a_column_would_grow_without_end(self, tmp_path: Path):
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        send(rig, json.dumps(body(metadata={"task_id": "t" * 3_000, "intent": "pay"})).encode())
        assert (rig.rows()[0].task_id, rig.rows()[0].intent) == ("t" * 256, "pay")

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/requests/run-%00",
            "/v1/requests/run-%ff",
            "/v1/requests/run-%F0%9F%92%9A",
            "/v1/requests/" + "x" * 5_000,
        ],
    )
    def test_a_run_of_an_odd_name_is_not_found_in_our_shape(self, tmp_path: Path, path: str):
        rig = make_rig(tmp_path)
        response = talk(rig, lambda client: client.get(path))
        assert (response.status_code, response.json()["error"]["code"]) == (404, "run_not_found")

    @pytest.mark.parametrize(
        "data", [b"", b"{", b"[]", b'{"actor":"\\ud800","reason":"r"}', b'{"actor":"a","reason":"r","more":1}']
    )
    def test_what_cannot_be_read_about_a_run_changes_nothing(self, tmp_path: Path, data: bytes):
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})

        async def ask(client: httpx.AsyncClient) -> int:
            run_id = (await client.post(CHAT, json=body())).headers["x-seatrial-run-id"]
            headers = {"content-type": "application/json"}
            return (await client.post(f"/v1/requests/{run_id}/override", content=data, headers=headers)).status_code

        assert talk(rig, ask) == 400
        assert not rig.rows()[0].human_override

    def test_an_outcome_is_a_truth_value_or_nothing(self, tmp_path: Path):
        """`success: "no"` read as true would turn a complaint into praise."""
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})

        async def say(client: httpx.AsyncClient) -> list[int]:
            run_id = (await client.post(CHAT, json=body())).headers["x-seatrial-run-id"]
            said = ({"actor": "a", "reason": "r", "success": value} for value in (None, "maybe", 2, [], {}))
            return [(await client.post(f"/v1/requests/{run_id}/outcome", json=each)).status_code for each in said]

        assert talk(rig, say) == [400] * 5
        assert rig.rows()[0].success == "unknown"


class TestKeys:
    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(max_codepoint=255), min_size=1, max_size=140))
    def test_a_key_is_taken_whole_or_refused(self, key: str):
        """What is taken can be a column, a path and the stem of `key~2`, and two keys never become one."""
        can_be_a_name = key.isascii() and key[0].isalnum() and len(key) <= 128
        if can_be_a_name and all(char.isalnum() or char in "._:-" for char in key):
            assert request_key(request_of(idempotency_key=key)) == key
        else:
            with pytest.raises(ApiError, match="idempotency-key"):
                request_key(request_of(idempotency_key=key))

    @pytest.mark.parametrize("key", ["a\n", "a\r\nx-evil: 1", "a\x00", "x" * 129, "\uff41"])
    def test_what_would_break_a_line_or_hide_in_one_is_refused(self, key: str):
        request = Request({"type": "http", "headers": [(b"idempotency-key", key.encode())]})
        with pytest.raises(ApiError):
            request_key(request)

    def test_an_empty_user_header_falls_back_to_the_conversation(self):
        chat = parse(body("hello"))
        assert session_key(request_of(x_session_key=""), chat) == session_key(request_of(), chat)

    def test_two_long_users_of_one_beginning_stay_one_session_only_past_the_cut(self):
        chat = parse(body("hello"))
        same, other = "x" * 256, "x" * 255
        assert session_key(request_of(x_session_key=same + "a"), chat) == session_key(
            request_of(x_session_key=same + "b"), chat
        )
        assert session_key(request_of(x_session_key=other + "a"), chat) != session_key(
            request_of(x_session_key=other + "b"), chat
        )


class TestStamps:
    @pytest.mark.parametrize("value", ["b\r\nset-cookie: a=1", "b\n", "modèle", "Ω", "a b", "\x00", "x" * 257])
    @pytest.mark.parametrize("stamp", ["model_version", "reward_model_version", "bundle_id"])
    def test_a_stamp_that_no_header_bears_is_refused_before_it_is_served(self, stamp: str, value: str):
        """Found at deployment, not at the first answer, whose tools have already run."""
        with pytest.raises(BadInputError, match=f"policy.{stamp}"):
            make_policy(**{stamp: value})

    def test_what_versions_look_like_is_a_stamp(self):
        policy = make_policy(model_version="gpt-oss-1m@sha256:0f/3", reward_model_version="7", bundle_id="x" * 256)
        assert policy.bundle_id == "x" * 256
        assert make_policy(path="/models/with space/ü").path == "/models/with space/ü"

    def test_every_answer_of_a_run_carries_the_same_stamps(self, tmp_path: Path):
        """Streamed or whole, first time or from the answer book."""
        rig = make_rig(tmp_path, scripts={STABLE: PAY})

        async def ask(client: httpx.AsyncClient) -> list[dict[str, str]]:
            asked = [(body(), "a"), (body(), "a"), (body(stream=True), "b"), (body(stream=True), "b")]
            answers = [await client.post(CHAT, json=value, headers={"idempotency-key": key}) for value, key in asked]
            return [{n: v for n, v in answer.headers.items() if n.startswith("x-")} for answer in answers]

        whole, again, streamed, streamed_again = talk(rig, ask)
        assert whole == again
        assert streamed == streamed_again
        assert whole | {"x-seatrial-run-id": "run-b"} == streamed
        assert len(whole) == 7, "six stamps, and the advice not to retry"


class TestModels:
    @pytest.mark.parametrize(
        "model", ["Shop", "shop ", " shop", "shop\n", "sft-a", "ppo-b", "shop:ppo-b", "*", "\uff53hop"]
    )
    def test_only_the_workflow_s_very_name_is_a_model(self, model: str):
        """A version's name is no model: nobody chooses their own arm of a comparison."""
        error = refused(body(model=model))
        assert (error.status, error.code) == (404, "model_not_found")
        json.dumps(error.body, ensure_ascii=False).encode()

    def test_a_bad_size_of_someone_else_s_model_is_still_not_ours(self):
        """The name is looked at before the sizes, and the fields before the name."""
        assert refused(body("x" * 500, model="gpt")).status == 404
        assert refused(body(model="gpt", n=2)).code == "unsupported_parameter"

    def test_limits_are_the_gateway_s_own(self, tmp_path: Path):
        rig = make_rig(tmp_path, scripts={STABLE: HELLO}, config={"api": replace(LIMITS, max_text_chars=2)})
        assert send(rig, json.dumps(body("hi")).encode()).status_code == 200
        assert send(rig, json.dumps(body("hi!")).encode()).status_code == 400
