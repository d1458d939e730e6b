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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import transformers
from PIL import Image
from pydantic import Field

from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors.base import Options, TransformersModel, digest
from mmdit_lora.json_files import parse_json
from mmdit_lora.layout import Layout

EXAMPLE = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
_MAX_REPLY_BYTES = 2**24

Pair = tuple[Image.Image, str]  # an image and a question


class Judge(Protocol):
    """Answers questions about images. `name` is the spec that opens it, without options."""

    name: str

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[bool | None]]:
        """Answers to each image's questions: True for yes, False for no, None for neither.

        Args:
            questions: one list per image; they are sent as they are, so they should ask for yes or no.

        Raises:
            ValueError: the numbers of images and lists differ.
            InputError: the model cannot be reached or refuses.
        """
        ...

    def fingerprint(self) -> str:
        """SHA-256 of everything known here that determines the answers: the key of caches."""
        ...


def yes_or_no(answer: str) -> bool | None:
    """What a model's answer means. If it does not begin with yes or no, only one of the two may occur in it.

    Text in <think> tags is ignored.
    """
    text = re.sub(r"<think>.*?(</think>|$)", " ", answer, flags=re.DOTALL | re.IGNORECASE).casefold()
    if first := re.match(r"\W*(yes|no)\b(?!\s+or\b)", text):
        return first[1] == "yes"
    found = set(re.findall(r"\b(yes|no)\b", text))
    return found == {"yes"} if len(found) == 1 else None


def crops(image: Image.Image, layout: Layout, *, margin: float = 0.0, least: int = 32) -> list[Image.Image]:
    """The crop of each box of a layout.

    Args:
        margin: how much is added on every side, as a share of the box's sides.
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


class _PairJudge(Judge):
    """Judges that answer (image, question) pairs one by one."""

    def ask(self, images: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[bool | None]]:
        """As `Judge.ask`."""
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images, but questions for {len(questions)}")
        pairs = [(image, text) for image, texts in zip(images, questions, strict=True) for text in texts]
        answers = iter(self._answer_pairs(pairs))
        return [[next(answers) for _ in texts] for texts in questions]

    def _answer_pairs(self, pairs: Sequence[Pair]) -> list[bool | None]:
        raise NotImplementedError


class TransformersOptions(Options):
    batch_size: int = Field(default=8, ge=1, description="questions at once")
    max_new_tokens: int = Field(default=16, ge=1, description="tokens of an answer")


class TransformersJudge(_PairJudge, TransformersModel):
    """An image-text-to-text model of transformers with a chat template; decoding is greedy.

    Raises:
        InputError: as `TransformersModel`, or the model has no chat template.
    """

    options_type = TransformersOptions

    def __init__(self, target: str | None, options: TransformersOptions, *, spec: str, device: str | None) -> None:
        self.name, self.options = spec.partition("?")[0], options
        kind = transformers.AutoModelForImageTextToText
        TransformersModel.__init__(self, kind, target, spec=spec, example=EXAMPLE, device=device, dtype="auto")
        if not getattr(self.processor, "chat_template", None):
            hint = f"take a model tuned for chats, as {EXAMPLE}"
            raise InputError(f"{self._folder} has no chat template", location=spec, hint=hint)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # answers are appended on the right
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def fingerprint(self) -> str:
        return digest("transformers judge", transformers.__version__, self.file_digests, self.options.model_dump())

    @torch.inference_mode()
    def _answer_pairs(self, pairs: Sequence[Pair]) -> list[bool | None]:
        tokenizer = self.processor.tokenizer
        out: list[bool | None] = []
        for start in range(0, len(pairs), self.options.batch_size):
            part = pairs[start : start + self.options.batch_size]
            chats = [
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
                for _, question in part
            ]
            texts = self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
            begin = tokenizer.bos_token
            has_begin = begin is not None and texts[0].startswith(begin)  # written by the template
            inputs = self.processor(
                text=texts,
                images=[[image.convert("RGB")] for image, _ in part],
                padding=True,
                return_tensors="pt",
                **({"add_special_tokens": False} if has_begin else {}),
            ).to(self.device, self.model.dtype)
            limit = self.options.max_new_tokens
            tokens = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=limit, pad_token_id=tokenizer.pad_token_id
            )
            new = tokens[:, inputs["input_ids"].shape[1] :]
            out += [yes_or_no(text) for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        return out


class EndpointOptions(Options):
    timeout: float = Field(default=120, gt=0, description="seconds to wait for an answer")
    max_tokens: int = Field(default=16, ge=1, description="tokens of an answer")
    workers: int = Field(default=4, ge=1, le=64, description="concurrent questions")
    key_env: str | None = Field(default=None, description="the environment variable that holds the server's key")


class EndpointJudge(_PairJudge):
    """A server with OpenAI's chat API (vLLM, llama.cpp, Ollama, LM Studio ...). Images are sent as PNG.

    Only the given URL is contacted. A server that does not answer, or answers 429 or 5xx, is asked three times in all. The
    fingerprint holds the URL, the model's name and the options: other weights under the same name are not noticed.

    Raises:
        InputError: the target is not URL#MODEL, or the variable of the key is not set.
    """

    options_type = EndpointOptions
    tries = 3

    def __init__(
        self, target: str | None, options: EndpointOptions, *, spec: str, device: str | None = None, wait: float = 1.0
    ) -> None:
        del device
        url, _, model = (target or "").partition("#")
        host = urlsplit(url).hostname
        if urlsplit(url).scheme not in ("http", "https") or not host or not model:
            hint = "write for example openai:http://localhost:8000/v1#MODEL"
            raise InputError(f"{target!r} is not URL#MODEL", location=spec, hint=hint)
        self.name, self.options, self.url, self.model = spec.partition("?")[0], options, url.rstrip("/"), model
        self._spec, self._wait = spec, wait
        self._headers = {"Content-Type": "application/json"}
        if options.key_env is not None:
            if options.key_env not in os.environ:
                raise InputError(f"the environment variable {options.key_env} is not set", location=spec)
            self._headers["Authorization"] = f"Bearer {os.environ[options.key_env]}"
        # A proxy of the environment cannot reach this machine's own servers.
        local = host in ("localhost", "127.0.0.1", "::1")
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))

    def fingerprint(self) -> str:
        return digest("openai judge", self.url, self.model, self.options.model_dump(include={"max_tokens"}))

    def _answer_pairs(self, pairs: Sequence[Pair]) -> list[bool | None]:
        with ThreadPoolExecutor(self.options.workers) as pool:
            return list(pool.map(self._answer, pairs))  # an error cancels what has not begun

    def _answer(self, pair: Pair) -> bool | None:
        image, question = pair
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        reply = self._post(body | {"temperature": 0, "seed": 0, "max_tokens": self.options.max_tokens})
        try:
            return yes_or_no(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._error(f"its answer has no choices[0].message.content: {json.dumps(reply)[:200]}") from None

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), self._headers)
        for left in reversed(range(self.tries)):
            try:
                with self._opener.open(request, timeout=self.options.timeout) as answer:
                    return parse_json(answer.read(_MAX_REPLY_BYTES).decode(), location="its answer")
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
        port = urlsplit(self.url).port or 80
        hint = f"start a server there that offers {self.model}, e.g. `vllm serve {self.model} --port {port}`"
        return InputError(f"{self.url} {what}", location=self._spec, hint=f"{hint}, or give another URL#MODEL")
