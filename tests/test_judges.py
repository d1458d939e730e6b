"""Judges: a real server on this machine, a tiny model of transformers, and the self-test of both."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit_lora.data.shapes import DOMAINS, make_scene
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors import open_judge, self_test_judge
from mmdit_lora.evaluation.detectors.judge import EndpointJudge, EndpointOptions, crops, yes_or_no
from mmdit_lora.evaluation.detectors.shapes import detect
from mmdit_lora.layout import Box, Layout
from tests.detector_makers import llava_folder, noise

Answer = Callable[[Image.Image, str], Any]
Reply = tuple[int, Any]


class Server(ThreadingHTTPServer):
    """Answers as `answer` does; `requests` holds the bodies and `headers` the headers that came; `faults` go first."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.faults = answer, list[Reply]()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        if self.path != "/v1/chat/completions":
            status, reply = 404, {"error": "no such path"}
        elif self.server.faults:
            status, reply = self.server.faults.pop(0)
        else:
            image, text = body["messages"][0]["content"]
            kind, data = image["image_url"]["url"].split(",")
            assert kind == "data:image/png;base64"
            said = self.server.answer(Image.open(io.BytesIO(base64.b64decode(data))), text["text"])
            status, reply = 200, {"choices": [{"message": {"content": said}}]}
        sent = json.dumps(reply).encode() if not isinstance(reply, bytes) else reply
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def judge_of(server: Server, **options: Any) -> EndpointJudge:
    spec = f"openai:{server.url}#some/model"
    return EndpointJudge(f"{server.url}#some/model", EndpointOptions(**options), spec=spec, wait=0.01)


def scenes(count: int = 6) -> tuple[list[Image.Image], list[Layout]]:
    images, layouts = zip(*(make_scene(DOMAINS["basic"], 7, index) for index in range(count)), strict=True)
    return list(images), list(layouts)


def by_eye(image: Image.Image, question: str) -> str:
    """An honest judge of procedural scenes: the exact reader."""
    asked = re.search(r"show an? (\w+) (\w+)\?", question)
    assert asked is not None
    room = Image.new("RGB", (64, 64), (128, 128, 128))
    room.paste(image, (8, 8))
    found = max(detect(room), key=lambda thing: thing.xyxy[2] - thing.xyxy[0], default=None)
    return "Yes." if found is not None and asked[1] == found.color else "No."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", True),
        ("no.", False),
        ("**Yes**, it does, with no doubt.", True),
        ("The answer is no.", False),
        ("<think>yes or no? yes</think>No", False),
        ("<think>yes, perhaps", None),
        ("Yes or no: I cannot tell", None),
        ("I say no, and you say yes", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_what_an_answer_means(answer: str, expected: bool | None) -> None:
    assert yes_or_no(answer) is expected


def test_crops_are_what_stands_in_the_boxes() -> None:
    image = noise(100, 50)
    layout = Layout("", [Box((0.1, 0.2, 0.5, 0.6), "x"), Box((0.999, 0.0, 1.0, 0.001), "x")])
    first, second = crops(image, layout, least=1)
    assert np.array_equal(np.asarray(first), np.asarray(image)[10:30, 10:50])
    assert second.size == (1, 1)
    wide, _ = crops(image, layout, margin=0.5, least=1)
    assert np.array_equal(np.asarray(wide), np.asarray(image)[0:40, 0:70])
    assert [crop.size for crop in crops(image, layout)] == [(64, 32), (32, 32)]


def test_the_server_gets_the_crops_and_questions_and_answers_come_back_in_order() -> None:
    def answer(image: Image.Image, question: str) -> str:
        return "Yes" if image.getpixel((0, 0)) == (255, 0, 0) and "red" in question else "No"

    red, blue = Image.new("RGB", (3, 2), (255, 0, 0)), Image.new("RGB", (3, 2), (0, 0, 255))
    with serving(answer) as server:
        judge = judge_of(server, max_tokens=3, workers=3)
        answers = judge.ask([red, blue, red], [["red?", "blue?"], ["red?"], []])
        again = judge.ask([red] * 20, [["red?", "blue?"]] * 20)
    assert answers == [[True, False], [False], []]
    assert again == [[True, False]] * 20
    body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some/model", 0, 3)
    assert len(server.requests) == 43
    assert set(server.keys) == {None}


def test_faults_are_tried_three_times() -> None:
    with serving(lambda *_: "yes") as server:
        server.faults = [(503, {"error": "loading"}), (429, {"error": "busy"})]
        assert judge_of(server).ask([noise()], [["a?"]]) == [[True]]
        assert len(server.requests) == 3
        server.faults = [(500, {"error": f"fault {n}"}) for n in range(4)]
        with pytest.raises(InputError, match=r"answers 500.*fault 2"):
            judge_of(server).ask([noise()], [["a?"]])
        assert (len(server.requests), len(server.faults)) == (6, 1)
        server.faults = [(404, {"error": "no model some/model"})]
        with pytest.raises(InputError, match=r"answers 404 .*no model some/model"):
            judge_of(server).ask([noise()], [["a?"]])
        assert len(server.requests) == 7  # what the server refuses is not asked again


@pytest.mark.parametrize("reply", [{"choices": []}, [], b"<html>", {"choices": [{"message": {"content": 3}}]}])
def test_answers_of_another_form_are_refused(reply: Any) -> None:
    with serving(lambda *_: "yes") as server:
        server.faults = [(200, reply)] * 3
        with pytest.raises(InputError, match=r"127.0.0.1.* (its answer|answers what)"):
            judge_of(server, workers=1).ask([noise()], [["a?"]])
    with serving(lambda *_: None) as server:
        assert judge_of(server).ask([noise()], [["a?"]]) == [[None]]


def test_a_server_that_is_not_there_is_named_with_a_cure() -> None:
    with serving(lambda *_: "yes") as server:
        judge = judge_of(server)
    with pytest.raises(InputError) as caught:
        judge.ask([noise()], [["a?"]])
    message = str(caught.value)
    assert f"{server.url} does not answer" in message
    assert f"`vllm serve some/model --port {server.server_port}`" in message


def test_a_key_is_sent_only_where_its_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not asked for")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy that is not there: local servers go without
    with serving(lambda *_: "no") as server:
        spec = f"openai:{server.url}#m"
        plain, keyed = open_judge(spec), open_judge(f"{spec}?key_env=JUDGE_KEY")
        assert plain.ask([noise()], [["a?"]]) == keyed.ask([noise()], [["a?"]]) == [[False]]
    assert server.keys == [None, "Bearer secret"]
    assert plain.fingerprint() == keyed.fingerprint() != open_judge(f"{spec}2").fingerprint()
    assert "secret" not in plain.name + keyed.name
    with pytest.raises(InputError, match="variable NO_SUCH_KEY is not set"):
        open_judge(f"{spec}?key_env=NO_SUCH_KEY")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("openai:localhost:8000#m", "is not URL#MODEL"),
        ("openai:http://localhost:8000/v1", "is not URL#MODEL"),
        ("openai:file:///etc/passwd#m", "is not URL#MODEL"),
        ("openai", "write for example openai:http://localhost:8000/v1#MODEL"),
        ("open:x", "did you mean 'openai'"),
        ("openai:http://localhost/v1#m?timeout=0", "timeout is '0'"),
        ("transformers", "`hf download HuggingFaceTB/SmolVLM2-2.2B-Instruct --local-dir models/"),
        (
            "transformers:some/model",
            "`hf download some/model --local-dir models/model`, then transformers:models/model",
        ),
    ],
)
def test_specs_that_are_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        open_judge(spec)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("llava"))


def test_a_model_of_transformers_answers_as_it_does_alone(llava: Path) -> None:
    """In batches, whose questions have other lengths, as one by one through its own processor."""
    judge: Any = open_judge(f"transformers:{llava}?batch_size=4", device="cpu", max_new_tokens=1)
    images = [noise(40, 30, seed) for seed in range(6)]
    questions = [["is this a red circle", "is this a dog"] if n % 2 else ["blue"] for n in range(6)]
    expected = []
    for image, asked in zip(images, questions, strict=True):
        row = []
        for question in asked:
            inputs = judge.processor(images=image, text=f"<image> {question} answer", return_tensors="pt")
            with torch.no_grad():
                logits = judge.model(**inputs).logits[0, -1]
            said = judge.processor.tokenizer.decode([5 + int(logits[5:8].argmax())])
            row.append({"yes": True, "no": False, "maybe": None}[said])
        expected.append(row)
    assert judge.ask(images, questions) == expected
    assert len({answer for row in expected for answer in row}) > 1
    assert re.fullmatch(r"[0-9a-f]{64}", judge.fingerprint())
    assert judge.fingerprint() != open_judge(f"transformers:{llava}", device="cpu").fingerprint()
    with pytest.raises(ValueError, match="6 images, but questions for 1"):
        judge.ask(images, questions[:1])


def test_a_folder_with_code_of_its_own_is_not_run(llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match=r"does not load.*\n.*asked as openai:URL#MODEL"):
        open_judge(f"transformers:{folder}", device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_model_that_cannot_chat_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no chat template"):
        open_judge(f"transformers:{llava_folder(tmp_path, chat=False)}", device="cpu")


class Says:
    """A judge that always says the same."""

    name = "says"

    def __init__(self, answer: bool | None) -> None:
        self.answer = answer

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[bool | None]]:
        assert len(images) == len(questions)
        return [[self.answer] * len(asked) for asked in questions]

    def fingerprint(self) -> str:
        return ""


def test_an_honest_judge_is_trusted_and_a_yes_sayer_is_not() -> None:
    images, layouts = scenes()
    with serving(by_eye) as server:
        honest = self_test_judge(judge_of(server), images, layouts)
    assert (honest.verdict, honest.reasons) == ("trusted", ())
    assert honest.questions == 2 * sum(len(layout.boxes) for layout in layouts)
    assert (honest.said_yes_to_true, honest.said_no_to_false, honest.answered) == (1, 1, 1)
    assert json.loads(json.dumps(honest.to_dict(), allow_nan=False))["verdict"] == "trusted"
    yes = self_test_judge(Says(True), images, layouts)
    assert (yes.verdict, yes.balanced, yes.said_yes_to_true) == ("useless", 0.5, 1)
    assert str(yes).startswith("says: useless (yes to 1.000 of what is true, no to 0.000")
    silent = self_test_judge(Says(None), images, layouts)
    assert (silent.verdict, silent.answered, silent.balanced) == ("useless", 0, 0)
    few = self_test_judge(Says(False), images, layouts, limit=3)
    assert (few.questions, few.verdict) == (6, "useless")


def test_false_questions_are_as_unlike_as_there_are() -> None:
    asked: list[list[str]] = []

    class Notes(Says):
        def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[bool | None]]:
            asked.extend(map(list, questions))
            return super().ask(images, questions)

    boxes = [Box((0, 0, 0.5, 0.5), phrase) for phrase in ("a dog", "the dog", "a white dog", "a cat", "a red car")]
    self_test_judge(Notes(True), [noise()], [Layout("", boxes)], question="{phrase}?")
    assert asked == [
        ["a dog?", "a cat?"],
        ["the dog?", "a cat?"],
        ["a white dog?", "a cat?"],
        ["a cat?", "a red car?"],
        ["a red car?", "a dog?"],
    ]
    with pytest.raises(InputError, match="at least two different phrases"):
        self_test_judge(Says(True), [noise()], [Layout("", boxes[:2])])
