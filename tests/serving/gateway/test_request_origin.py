"""Web pages that try to speak to the gateway: simple requests, foreign origins, rebound names; and who must get in."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from rl_actors.contracts.errors import BadInputError
from serving.gateway.answer import LiveRequests
from serving.gateway.http import build_app
from serving.gateway.openai_api import ApiError
from serving.gateway.request_origin import OriginGuard, host_parts, is_address, refusal, trusted_names
from tests.serving.gateway.live_fakes import HELLO, STABLE, Rig, body, make_config, make_rig

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
TRUSTED = trusted_names(("gateway.example.org",))


def verdict(method: str = "GET", *pairs: tuple[str, str], trusted: frozenset[str] = TRUSTED) -> ApiError | None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
    return refusal(method, Headers(raw=raw), trusted)


def code_of(error: ApiError | None) -> str:
    return "" if error is None else f"{error.status} {error.code}"


def talk(rig: Rig, conversation: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with rig.client() as client:
            return await asyncio.wait_for(conversation(client), 20.0)

    return asyncio.run(run())


class TestHost:
    @pytest.mark.parametrize(
        "host",
        [
            "127.0.0.1:8000", "127.0.0.1", "[::1]:8000", "[::1]", "10.1.2.3:80", "localhost", "LocalHost:8000",
            "localhost.", "gateway.example.org", "GATEWAY.example.org.:443",
        ],
    )  # fmt: skip
    def test_an_address_or_one_of_our_names_passes(self, host: str):
        assert verdict("GET", ("host", host)) is None

    def test_the_machine_s_own_names_pass(self):
        for name in (socket.gethostname(), socket.getfqdn()):
            assert verdict("GET", ("host", f"{name}:8000")) is None

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "xlocalhost",
            "127.0.0.1.nip.io:8000", "example.org", "a.gateway.example.org", "gateway.example.org.evil",
            "2130706433", "127.1", "0x7f000001", "user@127.0.0.1", "127.0.0.1:80:80", "localhost:x", "localhost/",
            "[::1", "::1", "[127.0.0.1", "", " ", "local host", "127.0.0.1,evil.example", "*",
        ],
    )  # fmt: skip
    def test_any_other_name_is_refused(self, host: str):
        error = verdict("GET", ("host", host))
        assert error is not None
        assert (error.status, error.code, error.param) == (403, "host_not_allowed", "host")
        assert "allowed_hosts" in error.message
        assert repr(host) in error.message

    def test_no_host_and_two_hosts_are_refused(self):
        assert code_of(verdict("GET")) == "403 host_not_allowed"
        twice = verdict("GET", ("host", "localhost"), ("host", "evil.example"))
        assert code_of(twice) == "403 host_not_allowed"

    def test_without_the_allow_list_the_name_is_a_stranger(self):
        """Negative control of the fixture: what the tests' own clients call the gateway passes only by the list."""
        assert verdict("GET", ("host", "gateway.example.org"), trusted=trusted_names(())) is not None

    @settings(max_examples=200, deadline=None)
    @given(st.ip_addresses(), st.none() | st.integers(0, 65_535))
    def test_every_address_passes_with_any_port(self, address: Any, port: int | None):
        name = f"[{address}]" if address.version == 6 else str(address)
        host = name if port is None else f"{name}:{port}"
        assert host_parts(host) == (str(address), port)
        assert verdict("GET", ("host", host)) is None

    @settings(max_examples=300, deadline=None)
    @given(st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=40))
    def test_whatever_passes_is_an_address_or_on_the_list(self, host: str):
        if verdict("GET", ("host", host)) is None:
            parts = host_parts(host)
            assert parts is not None
            assert is_address(parts[0]) or parts[0] in TRUSTED


class TestOrigin:
    @pytest.mark.parametrize(
        ("host", "origin"),
        [
            ("127.0.0.1:8000", "http://127.0.0.1:8000"),
            ("localhost", "http://localhost"),
            ("localhost:80", "http://localhost"),
            ("gateway.example.org", "https://gateway.example.org"),
            ("gateway.example.org", "https://gateway.example.org:443"),
            ("[::1]:8000", "http://[::1]:8000"),
            ("localhost:8000", "http://LOCALHOST:8000"),
        ],
    )
    def test_our_own_page_passes(self, host: str, origin: str):
        assert verdict("POST", ("host", host), ("origin", origin), *JSON.items()) is None

    @pytest.mark.parametrize(
        "origin",
        [
            "http://evil.example", "https://evil.example", "http://127.0.0.1", "http://127.0.0.1:3000", "null", "",
            "http://localhost:8000", "http://127.0.0.1:8000.evil.example", "http://evil.example#127.0.0.1:8000",
            "https://127.0.0.1", "file://", "chrome-extension://abc", "127.0.0.1:8000", "http://[::1", "http://",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
    def test_any_other_page_is_refused_whatever_it_sends(self, method: str, origin: str):
        error = verdict(method, ("host", "127.0.0.1:8000"), ("origin", origin), *JSON.items())
        assert error is not None
        assert (error.status, error.code, error.param) == (403, "origin_not_allowed", "origin")
        assert repr(origin) in error.message

    def test_two_origins_are_refused(self):
        ours = ("origin", "http://localhost")
        assert code_of(verdict("GET", ("host", "localhost"), ours, ours)) == "403 origin_not_allowed"

    def test_a_rebound_page_is_its_own_origin_and_is_stopped_by_its_name(self):
        """After rebinding, Origin and Host agree: only the name gives the page away."""
        error = verdict("POST", ("host", "evil.example:8000"), ("origin", "http://evil.example:8000"), *JSON.items())
        assert code_of(error) == "403 host_not_allowed"

    def test_programs_send_none(self):
        assert verdict("POST", ("host", "localhost"), *JSON.items()) is None


class TestMediaType:
    @pytest.mark.parametrize(
        "value", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/json ;x=1"]
    )
    def test_json_passes(self, value: str):
        assert verdict("POST", ("host", "localhost"), ("content-type", value)) is None

    @pytest.mark.parametrize(
        "value",
        [
            "text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "multipart/form-data; b=1",
            "", "text/plain; application/json", "text/plain, application/json", "application/json, text/plain",
            "application/jsonp", "application/json+x", "json", "*/*",
        ],
    )  # fmt: skip
    def test_what_a_page_may_send_unasked_is_refused(self, value: str):
        error = verdict("POST", ("host", "localhost"), ("content-type", value))
        assert error is not None
        assert (error.status, error.code, error.param) == (415, "unsupported_media_type", "content-type")
        assert "application/json" in error.message
        assert repr(value) in error.message

    def test_none_and_two_are_refused(self):
        """A Blob without a type is sent without the header."""
        assert code_of(verdict("POST", ("host", "localhost"))) == "415 unsupported_media_type"
        twice = [("content-type", "application/json"), ("content-type", "text/plain")]
        assert code_of(verdict("POST", ("host", "localhost"), *twice)) == "415 unsupported_media_type"

    @pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
    def test_what_has_no_body_needs_no_type(self, method: str):
        assert verdict(method, ("host", "localhost")) is None


class TestAllowList:
    @pytest.mark.parametrize("name", ["gateway", "gateway.example.org", "desk_1.svc.cluster.local", "x"])
    def test_plain_names(self, tmp_path: Path, name: str):
        assert replace(make_config(tmp_path), allowed_hosts=(name,)).allowed_hosts == (name,)

    @pytest.mark.parametrize(
        "name", ["", "*", "*.example.org", "http://gateway", "gateway:8000", "a b", "a/b", "-x", "x" * 254, "[::1]"]
    )
    def test_what_could_never_match_is_refused(self, tmp_path: Path, name: str):
        with pytest.raises(BadInputError, match=r"gateway\.allowed_hosts.*bare name"):
            replace(make_config(tmp_path), allowed_hosts=("gateway", name))

    def test_nothing_is_allowed_by_default(self, tmp_path: Path):
        fields = type(make_config(tmp_path)).__dataclass_fields__
        assert fields["allowed_hosts"].default == ()

    def test_case_and_final_dot_do_not_matter(self):
        assert verdict("GET", ("host", "DESK.:80"), trusted=trusted_names(("Desk",))) is None

    def test_an_unnamed_machine_trusts_no_empty_name(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(socket, "gethostname", lambda: "")
        monkeypatch.setattr(socket, "getfqdn", lambda: "")
        assert trusted_names(()) == {"localhost"}


POSTS = (CHAT, "/v1/requests/run-k/override", "/v1/requests/run-k/outcome")


class TestApplication:
    """The rules in front of every route."""

    def refused(self, response: httpx.Response) -> tuple[int, str]:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.headers["x-should-retry"] == "false"
        return response.status_code, response.json()["error"]["code"]

    @pytest.mark.parametrize("path", POSTS)
    def test_a_simple_request_of_a_page_changes_nothing(self, tmp_path: Path, path: str):
        """What `fetch(url, {method: "POST", mode: "no-cors", body})` sends."""
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})

        async def attack(client: httpx.AsyncClient) -> httpx.Response:
            await client.post(CHAT, json=body(), headers={"idempotency-key": "k"})
            data = b'{"actor":"a","reason":"r","success":false,"model":"shop","messages":[]}'
            return await client.post(path, content=data, headers={"content-type": "text/plain;charset=UTF-8"})

        assert self.refused(talk(rig, attack)) == (415, "unsupported_media_type")
        assert len(rig.rows()) == 1
        assert not rig.rows()[0].human_override
        assert rig.ledger.audit("run-k") == ()

    @pytest.mark.parametrize("path", POSTS)
    def test_a_page_of_another_origin_changes_nothing(self, tmp_path: Path, path: str):
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        headers = {"origin": "http://evil.example"}
        response = talk(rig, lambda client: client.post(path, json=body(), headers=headers))
        assert self.refused(response) == (403, "origin_not_allowed")
        assert rig.rows() == []

    @pytest.mark.parametrize("path", ["/v1/requests/run-k", "/v1/models", "/healthz", "/nothing"])
    def test_a_rebound_name_reads_nothing(self, tmp_path: Path, path: str):
        rig = make_rig(tmp_path, scripts={STABLE: HELLO})
        response = talk(rig, lambda client: client.get(path, headers={"host": "evil.example:8000"}))
        assert self.refused(response) == (403, "host_not_allowed")

    def test_a_preflight_is_not_answered_with_a_permission(self, tmp_path: Path):
        headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        response = talk(make_rig(tmp_path), lambda client: client.options(CHAT, headers=headers))
        assert response.status_code == 403
        assert not [name for name in response.headers if name.startswith("access-control")]

    def test_without_the_list_the_tests_own_name_is_refused(self, tmp_path: Path):
        rig = make_rig(tmp_path, scripts={STABLE: HELLO}, config={"allowed_hosts": ()})
        assert self.refused(talk(rig, lambda client: client.post(CHAT, json=body()))) == (403, "host_not_allowed")
        assert rig.rows() == []

    @pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"])
    def test_the_openai_client_and_httpx_comply(self, tmp_path: Path, url: str):
        rig = make_rig(tmp_path, scripts={STABLE: HELLO}, config={"allowed_hosts": ()})

        async def ask() -> tuple[str | None, int]:
            app = build_app(rig.ports, LiveRequests(rig.ports).answer)
            transport = httpx.ASGITransport(app=app)
            async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
                library = openai.AsyncOpenAI(
                    base_url=f"{url}/v1",
                    api_key="-",
                    http_client=client,  # type: ignore[arg-type]
                    max_retries=0,
                )
                answer = await library.chat.completions.create(
                    model="shop", messages=[{"role": "user", "content": "hi"}]
                )
                return answer.choices[0].message.content, (await client.post(f"{url}{CHAT}", json=body())).status_code

        assert asyncio.run(ask()) == ("Hello there.", 200)

    def test_other_kinds_of_scope_pass_through(self):
        """The lifespan has no headers; a guard that asked for them would keep the gateway from starting."""
        seen: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["type"])

        asyncio.run(OriginGuard(app, frozenset())({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
        assert seen == ["lifespan"]
