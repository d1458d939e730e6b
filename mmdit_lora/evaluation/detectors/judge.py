"""Judges: models that answer yes-or-no questions about crops of images, as LayoutSAM-Eval asks them of colour, texture
and shape (CreatiLayout, arXiv 2412.03859)."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Protocol
from urllib.parse import urlsplit

from PIL import Image
from pydantic import Field

from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors.common import (
    Options,
    default_device,
    digest,
    digest_of_files,
    folder_files,
    load_whole,
    model_folder,
    part_of,
)
from mmdit_lora.json_files import parse_json
from mmdit_lora.layout import Layout

QUESTION = "Does this image show {phrase}? Answer with yes or no only."
EXAMPLE = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
_LONGEST = 2**24  # bytes of a server's answer


class Judge(Protocol):
    """Answers questions about images. `name` is the spec that opens it, without options."""

    name: str

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[bool | None]]:
        """Answers to each image's questions: True for yes, False for no, None for neither.

        Args:
            questions: one list an image; they are put as they are, so they should ask for yes or no.

        Raises:
            ValueError: not as many lists as images.
            InputError: the model cannot be reached or refuses.
        """
        ...

    def fingerprint(self) -> str:
        """SHA-256 of all that decides its answers, as far as it can be known from here: the key of stored answers."""
        ...


def yes_or_no(answer: str) -> bool | None:
    """What a model's answer means. Where it does not begin with yes or no, only one of both may occur in it.

    What stands in <think> tags is no answer.
    """
    text = re.sub(r"<think>.*?(</think>|$)", " ", answer, flags=re.DOTALL | re.IGNORECASE).casefold()
    found = re.findall(r"\b(yes|no)\b", text)
    first = re.match(r"\W*(yes|no)\b(?!\s+or\b)", text)
    if first:
        return first[1] == "yes"
    return found[0] == "yes" if len(set(found)) == 1 else None


def crops(image: Image.Image, layout: Layout, *, margin: float = 0.0, least: int = 32) -> list[Image.Image]:
    """What stands in each box of a layout, in its order.

    Args:
        margin: how much is added on every side, as a share of the box's own sides.
        least: pixels of the shorter side; smaller crops are enlarged, as many models refuse those below 28.
    """
    out = []
    for box in layout.boxes:
        left, top, right, bottom = box.xyxy
        dx, dy = margin * box.width, margin * box.height
        x0 = min(int(max(left - dx, 0) * image.width), image.width - 1)
        y0 = min(int(max(top - dy, 0) * image.height), image.height - 1)
        x1 = max(round(min(right + dx, 1) * image.width), x0 + 1)
        y1 = max(round(min(bottom + dy, 1) * image.height), y0 + 1)
        crop = image.crop((x0, y0, x1, y1))
        scale = least / min(crop.size)
        if scale > 1:
            crop = crop.resize((round(crop.width * scale), round(crop.height * scale)), Image.Resampling.BICUBIC)
        out.append(crop)
    return out


class TransformersOptions(Options):
    batch_size: int = Field(default=8, ge=1, description="questions at once")
    max_new_tokens: int = Field(default=16, ge=1, description="tokens of an answer")


class TransformersJudge:
    """An image-text-to-text model of transformers with a chat template; answers are its likeliest words, never drawn."""

    def __init__(self, target: str | None, options: TransformersOptions, *, spec: str, device: str | None) -> None:
        import transformers

        self.name, self.options, self.device = spec.partition("?")[0], options, default_device(device)
        folder = model_folder(target, spec=spec, example=EXAMPLE)
        load = transformers.AutoModelForImageTextToText.from_pretrained
        self.model = load_whole(load, folder, spec=spec, dtype="auto").to(self.device)
        self.processor = part_of(transformers.AutoProcessor.from_pretrained, folder, spec=spec)
        if not getattr(self.processor, "chat_template", None):
            raise InputError(
                f"{folder} has no chat template", location=spec, hint=f"take a model tuned for chats, as {EXAMPLE}"
            )
        self.processor.tokenizer.padding_side = "left"  # answers are appended on the right
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        self._folder = folder
        self._version = transformers.__version__

    @cached_property
    def _weights(self) -> list[list[str]]:
        return digest_of_files(*folder_files(self._folder))  # reads them all: only where it is asked for

    def fingerprint(self) -> str:
        return digest("transformers judge", self._version, self._weights, self.options.model_dump())

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[bool | None]]:
        """As `Judge.ask`."""
        return _one_by_one(images, questions, self._answers)

    def _answers(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[bool | None]:
        import torch

        out: list[bool | None] = []
        for start in range(0, len(pairs), self.options.batch_size):
            part = pairs[start : start + self.options.batch_size]
            chats = [
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
                for _, question in part
            ]
            texts = self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
            begin = self.processor.tokenizer.bos_token
            twice = begin is not None and texts[0].startswith(begin)  # the template has written it already
            inputs = self.processor(
                text=texts,
                images=[[image.convert("RGB")] for image, _ in part],
                padding=True,
                return_tensors="pt",
                **({"add_special_tokens": False} if twice else {}),
            ).to(self.device, self.model.dtype)
            with torch.inference_mode():
                tokens = self.model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=self.options.max_new_tokens,
                    pad_token_id=self.processor.tokenizer.pad_token_id,
                )
            new = tokens[:, inputs["input_ids"].shape[1] :]
            out += [yes_or_no(text) for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        return out


class EndpointOptions(Options):
    timeout: float = Field(default=120, gt=0, description="seconds to wait for an answer")
    max_tokens: int = Field(default=16, ge=1, description="tokens of an answer")
    workers: int = Field(default=4, ge=1, le=64, description="questions under way at once")
    key_env: str | None = Field(default=None, description="the environment variable that holds the server's key")


class EndpointJudge:
    """A server that speaks OpenAI's chat form (vLLM, llama.cpp, Ollama, LM Studio ...). Images travel in the request as PNG.

    Nothing but the URL given is asked. A server that does not answer, or answers 429 or 5xx, is asked three times in
    all. The fingerprint holds the URL, the model's name and the options: a server that changes its weights behind the
    same name is not noticed.
    """

    tries = 3

    def __init__(self, target: str | None, options: EndpointOptions, *, spec: str, wait: float = 1.0) -> None:
        url, _, model = (target or "").partition("#")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname or not model:
            raise InputError(
                f"{target!r} is not URL#MODEL",
                location=spec,
                hint="write for example openai:http://localhost:8000/v1#MODEL",
            )
        self.name, self.options, self.url, self.model = spec.partition("?")[0], options, url.rstrip("/"), model
        self._spec, self._wait = spec, wait
        self._headers = {"Content-Type": "application/json"}
        if options.key_env is not None:
            if options.key_env not in os.environ:
                raise InputError(f"the environment variable {options.key_env} is not set", location=spec)
            self._headers["Authorization"] = f"Bearer {os.environ[options.key_env]}"
        # A proxy of the environment cannot know this machine's own servers.
        local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))

    def fingerprint(self) -> str:
        decides = self.options.model_dump(include={"max_tokens"})
        return digest("openai judge", self.url, self.model, decides)

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[bool | None]]:
        """As `Judge.ask`."""
        return _one_by_one(images, questions, self._answers)

    def _answers(self, pairs: Sequence[tuple[Image.Image, str]]) -> list[bool | None]:
        with ThreadPoolExecutor(self.options.workers) as pool:
            asked = [pool.submit(self._answer, image, question) for image, question in pairs]
            try:
                return [answer.result() for answer in asked]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _answer(self, image: Image.Image, question: str) -> bool | None:
        held = io.BytesIO()
        image.convert("RGB").save(held, "PNG")
        url = "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
        reply = self._post(
            {
                "model": self.model,
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": url}},
                            {"type": "text", "text": question},
                        ],
                    }
                ],
                "temperature": 0,
                "seed": 0,
                "max_tokens": self.options.max_tokens,
            }
        )
        try:
            return yes_or_no(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._error(f"its answer has no choices[0].message.content: {json.dumps(reply)[:200]}") from None

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), self._headers)
        for left in reversed(range(self.tries)):
            try:
                with self._opener.open(request, timeout=self.options.timeout) as answer:
                    return parse_json(answer.read(_LONGEST).decode(), location="its answer")
            except urllib.error.HTTPError as error:
                text = error.read(400).decode(errors="replace").strip()
                if not left or (error.code != 429 and error.code < 500):
                    raise self._error(f"answers {error.code} {error.reason}: {text}") from None
            except ValueError as error:
                raise self._error(f"answers what is no JSON ({error})") from None
            except OSError as error:  # refused, no such host, timed out, broken off
                if not left:
                    raise self._error(f"does not answer ({getattr(error, 'reason', error)})") from None
            time.sleep(self._wait * 2 ** (self.tries - 1 - left))
        raise AssertionError("the last try returns or raises")

    def _error(self, what: str) -> InputError:
        return InputError(
            f"{self.url} {what}",
            location=self._spec,
            hint=f"start a server there that offers {self.model}, for example `vllm serve {self.model} --port "
            f"{urlsplit(self.url).port or 80}`, or give another URL#MODEL",
        )


def open_transformers(
    target: str | None, options: TransformersOptions, *, spec: str, device: str | None
) -> TransformersJudge:
    """Raises InputError where the model is not to be had, does not load whole or cannot chat."""
    return TransformersJudge(target, options, spec=spec, device=device)


def open_endpoint(target: str | None, options: EndpointOptions, *, spec: str, device: str | None) -> EndpointJudge:  # noqa: ARG001
    """Raises InputError for a target that is not URL#MODEL. The server is first asked by `ask`."""
    return EndpointJudge(target, options, spec=spec)


def _one_by_one(
    images: Sequence[Image.Image],
    questions: Sequence[Sequence[str]],
    answers: Callable[[Sequence[tuple[Image.Image, str]]], list[bool | None]],
) -> list[list[bool | None]]:
    """All pairs of image and question through `answers`, and back into one list an image."""
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images, but questions for {len(questions)}")
    flat = answers([(image, question) for image, asked in zip(images, questions, strict=True) for question in asked])
    rest = iter(flat)
    return [[next(rest) for _ in asked] for asked in questions]
