"""A judge or reward model by address, against a real local server."""

import json
import math
import pickle
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from expert_iteration.cli import compose_config
from expert_iteration.errors import UserError
from expert_iteration.judging import Judge
from expert_iteration.openai_reward import fill_in, load_openai_reward, parse_score, read_pooling
from expert_iteration.resolve import resolve_config
from expert_iteration.tasks import Problem, Task, load_task

PROBLEM = Problem("Is {response} a {brace}?", "yes")
AT_ONCE = {"retry-after-ms": "1"}  # the client's own pauses begin with half a second


class Server:
    """An OpenAI-compatible server whose answer to a request is `answer(path, body) -> (status, headers, json)`."""

    def __init__(self) -> None:
        self.models = ["judge-1"]
        self.answer: Callable = lambda path, body: (200, {}, {})
        self.requests: list[tuple[str, str, dict]] = []  # path, authorization, body
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.requests.append((self.path, self.headers["authorization"], {}))
                if self.path == "/v1/models":
                    data = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in server.models]
                    self.reply(200, {}, {"object": "list", "data": data})
                else:
                    self.reply(404, {}, {"error": "not here"})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server._lock:
                    server.requests.append((self.path, self.headers["authorization"], body))
                    server.at_once += 1
                    server.most_at_once = max(server.at_once, server.most_at_once)
                reply = server.answer(self.path, body)
                with server._lock:
                    server.at_once -= 1
                self.reply(*reply)

            def reply(self, status, headers, content):
                text = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.root = f"http://127.0.0.1:{self.http.server_port}"
        self.url = f"{self.root}/v1"
        threading.Thread(target=self.http.serve_forever, args=[0.01], daemon=True).start()


@pytest.fixture(autouse=True)
def no_key_and_no_proxy(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def configured(url: str, *overrides: str):
    return resolve_config(compose_config("ei_tiny", "sync", [f"reward.openai_url={url}", *overrides]), "sync")


def load(server: Server, *overrides: str):
    return load_openai_reward(configured(server.url, *(f"reward.openai_{override}" for override in overrides)).reward)


def chat(text: str | None):
    message = {"role": "assistant", "content": text}
    return 200, {}, {"id": "1", "object": "chat.completion", "created": 0, "model": "judge-1", "choices": [
        {"index": 0, "finish_reason": "stop", "message": message}
    ]}  # fmt: skip


def judged_by_length(path, body):
    response = body["messages"][0]["content"].partition("<response>\n")[2].partition("\n</response>")[0]
    return chat(f"Well.\nScore: {len(response)}")


# Judges


def test_a_judge_scores_all_responses_in_their_order(server):
    server.answer = judged_by_length
    rewards = load(server)([PROBLEM] * 20, ["x" * (number % 11) for number in range(20)])
    assert rewards == [(number % 11) / 10 for number in range(20)]
    path, _, body = server.requests[-1]
    assert path == "/v1/chat/completions"
    assert body["model"] == "judge-1"
    assert body["temperature"] == 0
    [message] = body["messages"]
    assert "Is {response} a {brace}?" in message["content"]
    assert "<reference_answer>\nyes\n</reference_answer>" in message["content"]


def test_a_prompt_of_ones_own(server, tmp_path):
    (tmp_path / "judge.txt").write_text("{not a place} {prompt}|{answer}|{response} -> {response}")
    server.answer = lambda path, body: chat("7/10")
    reward = load(server, f"prompt={tmp_path / 'judge.txt'}")
    assert reward([PROBLEM], ["{prompt} \\1"]) == [0.7]
    assert server.requests[-1][2]["messages"][0]["content"] == (
        "{not a place} Is {response} a {brace}?|yes|{prompt} \\1 -> {prompt} \\1"
    )
    (tmp_path / "judge.txt").write_text("How good is it?")
    with pytest.raises(UserError, match=r"openai_prompt \(.*\) must hold \{response\}"):
        load(server, f"prompt={tmp_path / 'judge.txt'}")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 7", 0.7),
        ("It says Score: 10 itself.\n\n**Score:** 2.5", 0.25),
        ("**Score: 8/10**", 0.8),
        ("My final score = [9]", 0.9),
        ("<think>maybe score: 3</think>\nscore: 0", 0.0),
        ("10", 1.0),
        (" 4/10.\n", 0.4),
        ("Score (0-10): 7", 0.7),
        ("**Score** [from 0 to 10]: 7", 0.7),
        ("Score: $7$", 0.7),
        (r"Score = \boxed{7}", 0.7),
        ("I think the score is 7", 0.7),
        ('{"score": 7}', 0.7),
        ("Score: 4/5", 0.8),
        ("Score: 7 out of 10.", 0.7),
        ("Score: 8\n- 2 points off, for a score: 10 would need more", 0.8),
        ("<think>\nScore: 3\n</think>I give it a score: 8", 0.8),
    ],
)
def test_score_of_a_reply(reply, score):
    assert parse_score(reply) == score


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I cannot judge it.",
        "Score: high",
        "Score: 11",
        "Score: -1",
        "scores 5",
        "It is 7",
        "Score: 0-10",
        "Score: 7 to 8",
        "Score: 7,5",
        "Score: 7/0",
        "Score: 6/5",
        "Score: 7%",
        "Score: 1e1",
        "<think>\nScore: 7\n",
    ],
)
def test_a_reply_without_a_score_is_none(reply):
    with pytest.raises(ValueError, match="the judge's"):
        parse_score(reply)


def test_texts_are_put_in_as_they_are():
    assert fill_in("{answer}{prompt}", Problem("{response}", "{prompt}"), "r") == "{prompt}{response}"


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_once_than_configured(server, concurrency):
    together = threading.Barrier(concurrency)

    def slowly(path, body):
        together.wait(20)  # so many there are
        time.sleep(0.03)  # and more would come
        return judged_by_length(path, body)

    server.answer = slowly
    load(server, f"concurrency={concurrency}")([PROBLEM] * 12, ["x"] * 12)
    assert server.most_at_once == concurrency


# Failures


def failing_first(count: int, status: int):
    tries: dict[str, int] = {}

    def answer(path, body):
        text = body["messages"][0]["content"]
        tries[text] = tries.get(text, 0) + 1
        if tries[text] <= count:
            return status, AT_ONCE, {"error": {"message": "not now"}}
        return judged_by_length(path, body)

    return answer


@pytest.mark.parametrize("status", [429, 500])
def test_what_may_pass_is_asked_again(server, status):
    server.answer = failing_first(2, status)
    assert load(server, "retries=2")([PROBLEM] * 2, ["x", "xx"]) == [0.1, 0.2]
    assert len([path for path, _, _ in server.requests if path.endswith("completions")]) == 6


def test_a_response_whose_requests_all_fail_is_left_out_and_says_why(server):
    def answer(path, body):
        if "bad" in body["messages"][0]["content"]:
            return 500, AT_ONCE, {"error": {"message": "out of memory"}}
        return judged_by_length(path, body)

    server.answer = answer
    judge = Judge(Task("test", None, [], [], load(server, "retries=1"), None, bool))
    judgements = judge([PROBLEM] * 3, ["x" * 10, "bad", "xx"])
    assert [judgement.reward for judgement in judgements] == [1.0, pytest.approx(math.nan, nan_ok=True), 0.2]
    assert [judgement.correct for judgement in judgements] == [True, False, False]
    assert "out of memory" in judge.take_notes()[0]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (chat("no idea"), "the judge's reply has no `Score: x`"),
        (chat(None), "the judge's reply has no `Score: x`"),
        ((200, {}, {"choices": []}), "IndexError"),
        ((200, {}, b"not JSON"), "Error"),
        ((400, {}, {"error": {"message": "prompt too long"}}), "prompt too long"),
    ],
)
def test_a_malformed_answer_fails_its_response(server, answer, why):
    server.answer = lambda path, body: answer
    [reward] = load(server, "retries=3")([PROBLEM], ["x"])
    assert math.isnan(reward)
    assert why in reward.reason
    assert len(server.requests) == 2  # for the models, and one that is not worth repeating


def test_a_request_that_takes_too_long_fails_its_response(server):
    released = threading.Event()
    server.answer = lambda path, body: released.wait(20) and chat("Score: 1")
    [reward] = load(server, "timeout=0.2", "retries=0")([PROBLEM], ["x"])
    released.set()
    assert "Timeout" in reward.reason


def test_a_server_that_went_away_ends_the_run(server):
    judge = Judge(Task("test", None, [], [], load(server, "retries=0"), None, bool))
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match=r"(?s)Of 5 prompts in a row.*APIConnectionError"):
        judge([Problem(f"{place}?", "yes") for place in range(8)], ["x"] * 8)


# The key, and what is served


@pytest.mark.parametrize(("key", "sent"), [("secret", "Bearer secret"), (None, "Bearer EMPTY")])
def test_the_key_comes_from_the_environment_and_travels_unseen(server, monkeypatch, key, sent):
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    server.answer = judged_by_length
    reward = load(server)
    assert "secret" not in repr(reward)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)  # as in an actor on another host
    assert pickle.loads(pickle.dumps(reward))([PROBLEM], ["x"]) == [0.1]
    assert {authorization for _, authorization, _ in server.requests} == {sent}


def test_the_only_model_is_taken_and_one_of_several_named(server):
    server.models = ["a", "b"]
    assert load(server, "model=b").model == "b"
    with pytest.raises(UserError, match=r"openai_model \(null\).* has a, b: name one"):
        load(server)
    with pytest.raises(UserError, match=r"openai_model \(c\) is not served.* has a, b"):
        load(server, "model=c")
    server.models = []
    with pytest.raises(UserError, match="which has none"):
        load(server)


def test_an_address_where_nobody_answers_is_refused():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="nobody answers there") as refused:
            load_task(configured(url))
        assert "\n" not in str(refused.value)


def test_an_address_of_something_else_is_refused(server):
    with pytest.raises(UserError, match=r"answers 404.*it should end as in http://host:8000/v1"):
        load_openai_reward(configured(server.root).reward)


# How it is asked for


def test_an_address_alone_replaces_the_tasks_reward_and_not_what_is_right(server):
    server.answer = judged_by_length
    task = load_task(configured(server.url))
    [judgement] = Judge(task)([Problem("1 + 1", "#### 2")], ["<answer>2</answer>"[:10]])
    assert judgement == (1.0, False, {})


def test_a_judge_is_one_of_several_rewards(server):
    server.answer = judged_by_length
    task = load_task(configured(server.url, "reward.fn=[tiny,openai]", "reward.weights=[1,0.5]"))
    [judgement] = Judge(task)([Problem("1 + 1", "#### 2")], ["12345"])
    assert judgement == (0.25, False, {"tiny": 0.0, "openai": 0.5})


# Reward models


def pooled(data):
    return 200, {}, {"id": "1", "object": "list", "model": "judge-1", "data": [{"index": 0, "data": data}]}


def test_a_reward_model_scores_the_dialog(server):
    server.answer = lambda path, body: pooled([-len(body["messages"][1]["content"]) - 0.5])
    assert load(server, "kind=reward_model")([PROBLEM] * 2, ["x", "xyz"]) == [-1.5, -3.5]
    path, _, body = server.requests[-1]
    assert path == "/pooling"  # vLLM has it beside /v1
    assert body["model"] == "judge-1"
    assert body["use_activation"] is False
    assert [message["role"] for message in body["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(("data", "reward"), [([2.5], 2.5), ([[0.1], [0.2], [2.5]], 2.5)])
def test_the_reward_is_that_of_the_sequence_or_of_its_last_token(data, reward):
    assert read_pooling(pooled(data)[2]) == reward


@pytest.mark.parametrize("data", [[0.1, 0.9], [[0.1, 0.9]], [], "base64", None])
def test_an_answer_with_another_number_of_rewards_is_none(data):
    with pytest.raises(ValueError, match="not the answer of a model with one reward"):
        read_pooling(pooled(data)[2])
