"""The server speaks OpenAI's protocol, rejects what it cannot do, and lets no one in through a browser."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

import pytest
from amfm_serve.server import ModelServer

from amfm.launch.cli import run
from amfm.pretrain.inference.generate import Sampling, generate
from tests.examples.serve.conftest import TEMPLATE
from tests.helpers.patience import PATIENCE_SECONDS

JSON = {"Content-Type": "application/json"}


def ask(server: ModelServer, path: str, body: Any = None, headers: dict[str, str] = JSON) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=PATIENCE_SECONDS)
    try:
        content = body if isinstance(body, str | None) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, content, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def complete(server: ModelServer, **body: Any) -> dict[str, Any]:
    status, text = ask(server, "/v1/completions", {"prompt": "a word", "temperature": 0, "max_tokens": 12, **body})
    assert status == 200, text
    return json.loads(text)


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_completion_is_what_generate_writes(server, imported):
    found = complete(server)
    expected = "".join(generate(imported, "a word", max_new_tokens=12, sampling=Sampling(temperature=0)))
    assert found["choices"][0]["text"] == expected
    assert (found["object"], found["model"]) == ("text_completion", "small")
    usage = found["usage"]
    assert usage["completion_tokens"] == 12 and usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_a_stream_brings_the_same_text_in_pieces(server):
    whole = complete(server)["choices"][0]["text"]
    body = {"prompt": "a word", "temperature": 0, "max_tokens": 12, "stream": True}
    status, text = ask(server, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    found = events(text)
    assert status == 200
    assert "".join(event["choices"][0]["text"] for event in found[:-1]) == whole
    assert len(found) > 3 and len({event["id"] for event in found}) == 1
    assert found[-2]["choices"][0]["finish_reason"] == "length"
    assert found[-1]["usage"]["completion_tokens"] == 12


def test_the_text_ends_before_a_stop_text_and_never_shows_a_part_of_it(server):
    whole = complete(server, max_tokens=30)["choices"][0]["text"]
    stop = whole[8:12]
    found = complete(server, max_tokens=30, stop=[stop, "never written"])["choices"][0]
    assert found == {"index": 0, "text": whole[: whole.index(stop)], "logprobs": None, "finish_reason": "stop"}
    body = {"prompt": "a word", "temperature": 0, "max_tokens": 30, "stop": stop, "stream": True}
    pieces = [event["choices"][0]["text"] for event in events(ask(server, "/v1/completions", body)[1])]
    assert "".join(pieces) == found["text"]


def test_a_seed_fixes_the_text(server):
    texts = [complete(server, temperature=1, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_is_the_completion_of_its_template(chat_server):
    messages = [{"role": "user", "content": "a word"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 10}
    status, text = ask(chat_server, "/v1/chat/completions", body)
    found = json.loads(text)
    assert (status, found["object"]) == (200, "chat.completion")
    message = found["choices"][0]["message"]
    ids = chat_server.model.encode_chat(chat_server.model.render_chat(messages))
    assert chat_server.model.tokenizer.eos_id in ids, "the template's control tokens are tokens, not letters"
    assert message == {"role": "assistant", "content": complete(chat_server, prompt=ids, max_tokens=10)["choices"][0]["text"]}  # fmt: skip
    stream = events(ask(chat_server, "/v1/chat/completions", body | {"stream": True})[1])
    assert stream[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in stream) == message["content"]
    assert "<assistant>" in TEMPLATE


def test_a_model_without_a_template_refuses_to_chat(server):
    status, text = ask(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]})
    assert status == 400
    assert "small has no chat template: it continues text" in json.loads(text)["error"]["message"]


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "gpt-4"}, 404, "model='gpt-4' is not served here; the one that is: small"),
        ({"n": 2}, 400, "n=2 has no effect here"),
        ({"logprobs": 5}, 400, "logprobs=5 has no effect here"),
        ({"temprature": 1}, 400, "temprature is not known here"),
        ({"temperature": -1}, 400, "temperature=-1 must be at least 0"),
        ({"top_p": "x"}, 400, "top_p='x' must be a number"),
        ({"max_tokens": 0}, 400, "max_tokens=0 must be an integer of at least 1"),
        ({"max_tokens": 600}, 400, "more than the 512 that this server takes"),
        ({"prompt": ""}, 400, "prompt must be one text"),
        ({"prompt": "a" * 10**6}, 400, "1000000 characters of prompt are more than the"),
        ({"prompt": "cut \ud83d"}, 400, "is not valid JSON: 'utf-8' codec can't encode character '\\ud83d'"),
        ({"prompt": [1, 10**9]}, 400, "with ids of at least 0 and below"),
        ({"stop": ["a"] * 5}, 400, "stop must be a text or up to four"),
    ],
)
def test_what_cannot_take_effect_is_refused(server, change, status, says):
    found, text = ask(server, "/v1/completions", {"prompt": "x", **change})
    assert found == status
    assert says in json.loads(text)["error"]["message"]


def test_bodies_and_hosts_that_a_foreign_page_could_send_are_refused(server):
    body = json.dumps({"prompt": "x"})
    assert ask(server, "/v1/completions", body, {"Content-Type": "text/plain"})[0] == 415
    assert ask(server, "/v1/completions", body, JSON | {"Host": "rebound.example:80"})[0] == 403
    assert ask(server, "/v1/models", None, {"Host": "rebound.example"})[0] == 403
    assert ask(server, "/v1/completions", "{", JSON)[0] == 400
    assert ask(server, "/v1/completions", "[]", JSON)[0] == 400
    assert ask(server, "/v1/completions", None)[0] == 404
    assert ask(server, "/v1/embeddings", body, JSON)[0] == 404
    assert ask(server, "/v1/completions", None, {"Host": "localhost"})[0] == 404


def talk(server: ModelServer, sent: bytes) -> str:
    """Send bytes and read until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()


def post(body: bytes, host: str = "127.0.0.1", *headers: str, kind: str = "application/json") -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", f"Host: {host}", f"Content-Type: {kind}", *headers]
    if not any(header.startswith(("Content-Length", "Transfer-Encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


INNER = post(b'{"prompt": "x", "max_tokens": 1}')


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (post(INNER, "evil.example"), 403),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\nContent-Length: %d\r\n\r\n" % len(INNER) + INNER, 403),
        (post(INNER, "127.0.0.1\r\nHost: evil.example"), 403),
        (post(INNER, kind="text/plain"), 415),
        (post(INNER, "127.0.0.1", "Content-Length: " + "9" * 5000), 413),
        (post(INNER, "127.0.0.1", "Content-Length: 0", "Content-Length: 4"), 413),
        (post(INNER, "127.0.0.1", "Content-Length: 0", "Transfer-Encoding: chunked"), 413),
        (post(b'{"prompt": ""}') + INNER, 400),
        (post(INNER, "127.0.0.1", "Content-Length : 4"), 400),
        (post(INNER).replace(b"/v1/completions", b"http://[/v1"), 400),
    ],
)
def test_what_follows_a_refused_request_is_not_another_one(server, sent, status):
    said = talk(server, sent)
    assert said.count("HTTP/1.1 ") == 1 and said.startswith(f"HTTP/1.1 {status} "), said
    assert "Connection: close" in said


def test_a_temperature_that_float32_rounds_to_nothing_is_the_most_likely_token(server):
    texts = [complete(server, temperature=temperature)["choices"][0]["text"] for temperature in (0, 1e-320)]
    assert texts[0] == texts[1]


def test_a_model_that_fails_is_an_answer(server, monkeypatch):
    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(server.model, "generate", fail)
    status, text = ask(server, "/v1/completions", {"prompt": "x"})
    assert (status, json.loads(text)["error"]["type"]) == (500, "server_error")
    assert "the model failed: out of memory" in text


def test_the_page_and_the_list_name_the_model(server):
    status, page = ask(server, "/")
    assert status == 200 and '{"model": "small", "chat": false}' in page
    assert "src=" not in page and "href=" not in page, "the page asks for nothing outside itself"
    assert json.loads(ask(server, "/v1/models")[1])["data"][0]["id"] == "small"


def test_a_port_in_use_is_one_message(imported, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["serve", str(imported), "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert said == f"amfm: port {port} of 127.0.0.1 is in use; give another one by --port, or 0 for any\n"


def test_what_is_no_model_is_bad_input(tmp_path, capsys):
    assert run(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "is not a checkpoint, run directory or imported model" in capsys.readouterr().err


def test_the_openai_client_gets_completions_chat_and_errors(server, chat_server):
    openai = pytest.importorskip("openai")

    def client(of: ModelServer) -> Any:
        return openai.OpenAI(base_url=f"{of.url}/v1", api_key="none", max_retries=0)

    name = client(server).models.list().data[0].id
    asked = {"model": name, "prompt": "a word", "max_tokens": 12, "temperature": 0}
    whole = client(server).completions.create(**asked).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in client(server).completions.create(**asked, stream=True)) == whole
    chat = {
        "model": "small-chat",
        "messages": [{"role": "user", "content": "a word"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    answer = client(chat_server).chat.completions.create(**chat).choices[0].message.content
    stream = client(chat_server).chat.completions.create(**chat, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client(server).chat.completions.create(**chat | {"model": name})
