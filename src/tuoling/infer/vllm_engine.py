"""The engine over an OpenAI-speaking server: vLLM that was started elsewhere or is started here, or any other one.

Two ways to ask. `VllmEngine` renders prompts itself and sends token ids, so that the server is asked exactly what
training rendered; for this it needs the model's tokenizer here. `ChatEngine` knows only a name at a server, sends
messages, and leaves the template to the server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Event
from typing import TYPE_CHECKING, Any

from tuoling import console
from tuoling.errors import EndpointError, UsageError
from tuoling.files import sha256_text
from tuoling.infer.client import Client
from tuoling.infer.engine import (
    FinishReason,
    GenerationSettings,
    OneModel,
    Piece,
    PromptTooLong,
    Reply,
    Score,
    TemplatePrompts,
)
from tuoling.infer.openai_answers import Completion, Delta, text_of, text_tokens
from tuoling.language import tr
from tuoling.text.conversation import Conversation
from tuoling.text.render import Learn, Segment
from tuoling.text.templates import Template
from tuoling.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from tuoling.infer.vllm_process import VllmProcess

_OVERFLOW = re.compile(
    r"maximum context length|context[ _](?:length|window|size)|max_model_len", re.IGNORECASE
)


class RemoteEngine(OneModel):
    """What both ways of asking share: options, answers, waiting for several at once. Beams and scores a server of this
    kind does not have."""

    name = "vllm"

    def __init__(
        self,
        client: Client,
        *,
        defaults: GenerationSettings | None = None,
        system: str | None = None,
        context_tokens: int | None = None,
        process: VllmProcess | None = None,
    ) -> None:
        """context_tokens: as the server says. process: a server that ends with this engine."""
        self.client = client
        self.defaults = defaults or GenerationSettings()
        self.system = system
        self.context_tokens = context_tokens
        self._process = process
        self._said_penalty = False

    def close(self) -> None:
        """Free the connections, and end the server if it was started for this engine."""
        self.client.close()
        if self._process is not None:
            self._process.close()

    def count_tokens(self, conversation: Conversation) -> int:
        """Tokens of the prompt."""
        raise NotImplementedError

    def _answer(self, conversation: Conversation, settings: GenerationSettings) -> Completion:
        raise NotImplementedError

    def _pieces(self, conversation: Conversation, settings: GenerationSettings) -> Generator[Delta]:
        raise NotImplementedError

    def stream(
        self, conversation: Conversation, settings: GenerationSettings, *, cancel: Event | None = None
    ) -> Generator[Piece]:
        """Answer piece by piece. Leaving closes the connection, on which the server stops too."""
        self.require_known(settings)
        parts: list[str] = []
        done: Completion | None = None
        with self._overflow(conversation, settings), closing(self._pieces(conversation, settings)) as deltas:
            for delta in deltas:
                done = delta.completion
                if done is None and delta.text:
                    parts.append(delta.text)
                    yield Piece(delta.text)
                if cancel is not None and cancel.is_set():
                    break
        text = "".join(parts)
        if done is None:
            done = Completion(text, "cancelled", None, None, self.client.endpoint.model)
        yield Piece("", self._reply(done, conversation))

    def generate(
        self,
        conversations: Sequence[Conversation],
        settings: GenerationSettings,
        *,
        cancel: Event | None = None,
    ) -> list[Reply]:
        """Ask for all, `concurrency` at once; batching them is the server's own affair."""
        self.require_known(settings)
        for conversation in conversations:
            self._require_room(conversation, settings)

        def ask(conversation: Conversation) -> Reply:
            if cancel is not None and cancel.is_set():
                return Reply("", (), "cancelled", 0, 0)
            return self.answer(conversation, settings)

        with ThreadPoolExecutor(self.client.endpoint.concurrency) as pool:
            asked = [pool.submit(ask, conversation) for conversation in conversations]
            try:
                return [one.result() for one in asked]
            except BaseException:
                for one in asked:
                    one.cancel()
                raise

    def answer(self, conversation: Conversation, settings: GenerationSettings) -> Reply:
        """Ask for one. Raises PromptTooLong, EndpointError."""
        with self._overflow(conversation, settings):
            return self._reply(self._answer(conversation, settings), conversation)

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        """Not over HTTP: OpenAI's API does not tell how likely a given text is."""
        raise UsageError(
            tr("a server does not say how likely a text is", "服务器接口不提供给定文本的概率"),
            where=self.client.endpoint.base_url,
            remedy="--engine torch",
        )

    # -- one request -------------------------------------------------------------------------------------------

    def _options(self, settings: GenerationSettings, room: int | None) -> dict[str, Any]:
        """OpenAI's fields, and vLLM's only where they say something that OpenAI's cannot."""
        longest = settings.max_new_tokens if room is None else min(settings.max_new_tokens, room)
        options: dict[str, Any] = {"max_tokens": longest, "temperature": 0.0}
        if settings.samples:
            options |= {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
            options["top_k"] = settings.top_k or None
        if settings.repetition_penalty != 1.0:
            options["repetition_penalty"] = settings.repetition_penalty
        options["min_tokens"] = min(settings.min_new_tokens, longest) or None
        options["stop"] = list(dict.fromkeys((*self._stops(), *settings.stop))) or None
        return options

    def _stops(self) -> tuple[str, ...]:
        return ()

    def require_known(self, settings: GenerationSettings) -> None:
        """Raise UsageError for what no server of this kind does: it would be left out in silence."""
        if settings.repetition_penalty != 1.0 and not self._said_penalty:
            self._said_penalty = True
            console.warn(
                tr(
                    "on a server the repetition penalty counts the question's words too",
                    "在服务器上，重复惩罚也会作用于问题里的词",
                )
            )
        for name in ("num_beams", "no_repeat_ngram_size"):
            if getattr(settings, name) > getattr(GenerationSettings(), name):
                raise UsageError(
                    tr(f"a server behind OpenAI's API has no {name}", f"OpenAI 接口的服务器没有 {name}"),
                    where=name,
                    remedy=tr(
                        f"{name}={getattr(GenerationSettings(), name)}, or --engine torch",
                        f"{name}={getattr(GenerationSettings(), name)}，或用 --engine torch",
                    ),
                )

    def _require_room(self, conversation: Conversation, settings: GenerationSettings) -> int | None:
        """Tokens that an answer may have; None where the server named no limit. Raises PromptTooLong."""
        if self.context_tokens is None:
            return None
        tokens = self.count_tokens(conversation)
        if tokens >= self.context_tokens:
            raise PromptTooLong(tokens, self.context_tokens - 1)
        return self.context_tokens - tokens

    def _overflow(self, conversation: Conversation, settings: GenerationSettings) -> _Overflow:
        return _Overflow(lambda: self.count_tokens(conversation), self.context_tokens)

    def _reply(self, done: Completion, conversation: Conversation) -> Reply:
        known: dict[str | None, FinishReason] = {"length": "length", "cancelled": "cancelled"}
        counts = done.prompt_tokens, done.completion_tokens
        prompt = self.count_tokens(conversation) if counts[0] is None else counts[0]
        answer = self._count_text(done.text) if counts[1] is None else counts[1]
        return Reply(done.text, (), known.get(done.finish_reason, "stop"), prompt, answer)

    def _count_text(self, text: str) -> int:
        """Tokens of an answer, where the server has not counted."""
        return text_tokens(text)


class _Overflow:
    """Turns the server's own words about a prompt that is too long into PromptTooLong."""

    def __init__(self, count: Callable[[], int], context_tokens: int | None) -> None:
        self._count = count
        self._context_tokens = context_tokens

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, EndpointError) and error.status == 400 and _OVERFLOW.search(error.problem):
            limit = re.search(r"\b(\d{2,})\b", _OVERFLOW.split(error.problem, 1)[1])
            room = self._context_tokens or (int(limit.group(1)) if limit else 0)
            raise PromptTooLong(self._count(), room - 1) from error


class VllmEngine(TemplatePrompts, RemoteEngine):
    """Implements `Engine`: our template and tokenizer, the server's arithmetic. Prompts go out as token ids."""

    def __init__(
        self,
        client: Client,
        tokenizer: TextTokenizer,
        template: Template,
        *,
        stops: Sequence[str] = (),
        end_ids: Iterable[int] = (),
        fingerprint: str = "",
        **remote: Any,
    ) -> None:
        """stops, end_ids: what ends a reply besides the template's stops and the tokenizer's end token.

        remote: RemoteEngine's keywords.
        """
        super().__init__(client, **remote)
        self.tokenizer = tokenizer
        self.template = template
        self.stops = tuple(dict.fromkeys((*template.stops, *stops)))
        self.fingerprint = sha256_text(f"{fingerprint}\n{client.endpoint.model}")
        # a stop that is one special token never shows in the text: it is named by its id
        as_tokens = [tokenizer.special_id(stop) for stop in self.stops]
        ends = (tokenizer.eos_id, *end_ids, *as_tokens)
        self._end_ids = list(dict.fromkeys(token for token in ends if token is not None))

    def _stops(self) -> tuple[str, ...]:
        return self.stops

    def _options(self, settings: GenerationSettings, room: int | None) -> dict[str, Any]:
        return super()._options(settings, room) | {"stop_token_ids": self._end_ids or None}

    def _answer(self, conversation: Conversation, settings: GenerationSettings) -> Completion:
        room = self._require_room(conversation, settings)
        return self.client.complete(self.prompt_ids(conversation), **self._options(settings, room))

    def _pieces(self, conversation: Conversation, settings: GenerationSettings) -> Generator[Delta]:
        room = self._require_room(conversation, settings)
        return self.client.stream_completion(self.prompt_ids(conversation), **self._options(settings, room))

    def _count_text(self, text: str) -> int:
        return self.tokenizer.count([Segment(text, False, row=True)])


class ServerTemplate:
    """Stands where an engine has its template: the server renders, nothing is known here."""

    id = "server"
    stops: tuple[str, ...] = ()
    default_system: str | None = None

    def fingerprint(self) -> str:
        """No bytes to hash."""
        return sha256_text("server")

    def to_jinja(self, tokenizer: TextTokenizer) -> str | None:
        """Unknown."""
        return None

    def prompt(self, conversation: Conversation) -> list[Segment]:
        """The newest question: all that is known of the prompt's text."""
        return [Segment(conversation.question.turns[-1].full_text, False, row=True)]

    def render(
        self, conversation: Conversation, *, learn: Learn = "all", train_on_inputs: bool = False
    ) -> list[Segment]:
        """The newest question and its answer."""
        return [*self.prompt(conversation), Segment(conversation.answer or "", True, row=True, reply=True)]


class ChatEngine(RemoteEngine):
    """Implements `Engine` by a model's name at a server, with messages."""

    def __init__(self, client: Client, **remote: Any) -> None:
        """remote: RemoteEngine's keywords."""
        super().__init__(client, **remote)
        self.template: Template = ServerTemplate()
        self.fingerprint = sha256_text(f"{client.endpoint.base_url}\n{client.endpoint.model}")

    def prompt_text(self, conversation: Conversation) -> str:
        """The newest question."""
        return conversation.question.turns[-1].full_text

    def count_tokens(self, conversation: Conversation) -> int:
        """An estimate: the server has the tokenizer."""
        return sum(text_tokens(text_of(message)) + 4 for message in self._messages(conversation))

    @staticmethod
    def _messages(conversation: Conversation) -> list[dict[str, Any]]:
        return [{"role": turn.role, "content": turn.full_text} for turn in conversation.turns]

    def _asked(self, conversation: Conversation, settings: GenerationSettings) -> dict[str, Any]:
        going_on: dict[str, Any] = {}
        if conversation.answer is not None:  # vLLM's fields: go on with the last message, do not open another
            going_on = {"continue_final_message": True, "add_generation_prompt": False}
        return self._options(settings, self._require_room(conversation, settings)) | going_on

    def _answer(self, conversation: Conversation, settings: GenerationSettings) -> Completion:
        options = self._asked(conversation, settings)
        if conversation.is_plain_text:
            return self.client.complete(conversation.turns[0].text, **options)
        return self.client.chat(self._messages(conversation), **options)

    def _pieces(self, conversation: Conversation, settings: GenerationSettings) -> Generator[Delta]:
        options = self._asked(conversation, settings)
        if conversation.is_plain_text:
            return self.client.stream_completion(conversation.turns[0].text, **options)
        return self.client.stream(self._messages(conversation), **options)
