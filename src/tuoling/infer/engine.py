"""The interface every chat engine follows, and what is asked of it: settings in, pieces and replies out.

A door (terminal, web page, HTTP API, prediction, evaluation) knows only this file; which library computes the
tokens is the engine's own affair.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from threading import Event
from typing import Any, Literal, Protocol

from tuoling.errors import ModelError, UsageError
from tuoling.language import tr
from tuoling.text.conversation import Conversation
from tuoling.text.render import Segment
from tuoling.text.templates import Template
from tuoling.text.tokenizer import TextTokenizer

FinishReason = Literal["stop", "length", "cancelled"]
"""stop: an end token or a stop string. length: max_new_tokens or the context was reached."""

_RANGES: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 1 << 20),
    "min_new_tokens": (0, 1 << 20),
    "temperature": (0.0, 10.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 1 << 20),
    "num_beams": (1, 64),
    "repetition_penalty": (0.01, 10.0),
    "no_repeat_ngram_size": (0, 64),
    "seed": (0, 2**63 - 1),
}
_SAMPLING = ("temperature", "top_p", "top_k")

BASE = "base"
"""The name under which the bare weights are chosen among the adapters that stand on them."""


class PromptTooLong(ModelError):
    """A prompt leaves no room for an answer in the model's context."""

    def __init__(self, tokens: int, room: int) -> None:
        self.tokens = tokens
        super().__init__(
            tr(
                f"the prompt has {tokens} tokens, there is room for {room}",
                f"提示有 {tokens} 个 token，最多只能有 {room} 个",
            ),
            remedy=tr("shorten the question", "请缩短问题"),
        )


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How a reply is chosen. Names are transformers'; the repetition knobs look at the reply only.

    temperature 0 means greedy. top_k 0 and top_p 1 are off. stop: strings that end a reply and are not shown.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise _out_of_range(name, value, low, high)
        if self.min_new_tokens > self.max_new_tokens:
            raise _out_of_range("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)

    @property
    def samples(self) -> bool:
        """True where the next token is drawn, not taken: temperature 0 is greedy."""
        return self.do_sample and self.temperature > 0

    def with_values(self, values: Mapping[str, Any]) -> GenerationSettings:
        """A copy with what is given (None is passed over), texts read as numbers.

        A sampling knob turns sampling on, unless `do_sample` is given too. Raises UsageError for a bad value.
        """
        given = {name: _read(name, value) for name, value in values.items() if value is not None}
        if "do_sample" not in given and any(name in given for name in _SAMPLING):
            given["do_sample"] = True
        return replace(self, **given)

    def idle_knobs(self) -> list[str]:
        """Names of knobs that are set and change nothing: those of sampling, and the seed, where nothing is drawn."""
        standard = GenerationSettings()
        if self.samples:
            return []
        idle = [name for name in _SAMPLING if getattr(self, name) not in (getattr(standard, name), 0)]
        return idle if self.seed is None else [*idle, "seed"]


def settings_from_config(config: Mapping[str, Any]) -> GenerationSettings:
    """Settings from a folder's generation_config.json; what is not there, or not usable, is the default."""
    settings = GenerationSettings()
    known = {field.name for field in fields(GenerationSettings)} - {"stop", "seed"}
    for name in known & config.keys():
        try:
            settings = replace(settings, **{name: _read(name, config[name])})
        except UsageError:
            continue
    return settings


def _read(name: str, value: Any) -> Any:
    """A value of the field's own type, from JSON or from what was typed."""
    standard: Any = {field.name: field.default for field in fields(GenerationSettings)}
    if name not in standard:
        raise UsageError(
            tr(f"no setting is called {name}", f"没有名为 {name} 的设置"),
            remedy=tr("there are: ", "可用：") + ", ".join(standard),
        )
    if name == "stop":
        return (value,) if isinstance(value, str) else tuple(value)
    want = int if name == "seed" else type(standard[name])
    try:
        if want is bool:
            return value if isinstance(value, bool) else _TRUTH[str(value).strip().lower()]
        number = float(value)
        if want is int and number != int(number):
            raise ValueError(value)
        return want(number)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UsageError(
            tr(f"{name}={value!r} is not {want.__name__}", f"{name}={value!r} 不是 {want.__name__} 类型"),
            where=name,
        ) from error


_TRUTH = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


def _out_of_range(name: str, value: float, low: float, high: float) -> UsageError:
    return UsageError(
        tr(f"{name}={value} is out of range", f"{name}={value} 超出范围"),
        where=name,
        remedy=tr(f"from {low:g} to {high:g}", f"范围是 {low:g} 到 {high:g}"),
    )


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer. token_ids: what was generated, without the end token; `text` ends before a stop string.

    beams: the texts of all beams, the best first (it is `text`); empty without beam search.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    beams: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """The next piece of an answer: take `back` characters off the end of what is shown, then append `text`.

    Only beam search takes anything back, when another beam becomes the best one.
    settled: how much of what is shown then, in characters, will never be taken back; None: all of it.
    beams:   the texts of the running beams, the best first; empty without beam search.
    The last piece carries the whole reply as well, and what is shown then is the reply's text.
    """

    text: str
    reply: Reply | None = None
    back: int = 0
    settled: int | None = None
    beams: tuple[str, ...] = ()


def append_only(pieces: Iterable[Piece]) -> Generator[Piece]:
    """The same answer for those who cannot take anything back (a pipe, an HTTP client): text comes when it is settled."""
    shown, said = "", 0
    for piece in pieces:
        shown = shown[: len(shown) - piece.back] + piece.text
        settled = len(shown) if piece.settled is None else piece.settled
        if settled > said or piece.reply is not None:
            yield Piece(shown[said:settled], piece.reply, beams=piece.beams)
            said = settled


@dataclass(frozen=True, slots=True)
class Score:
    """How likely learned text is: the sum of its cross entropy in nats, and its number of tokens."""

    nats: float
    tokens: int


class Engine(Protocol):
    """Answers conversations. Made by `infer.open_engine.open_engine`; closed when its user is done."""

    name: str
    template: Template
    defaults: GenerationSettings
    system: str | None
    """The system text the model was tuned with, if any."""
    fingerprint: str
    """Changes whenever the answers to the same questions may have."""
    context_tokens: int | None
    """Prompt and answer together; None where the model sets no limit."""
    adapter: str | None
    """Which of `adapters` answers here; None without any."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names for `using`: the adapters on one base, the one opened first in front, and BASE. () without any."""
        ...

    def using(self, adapter: str) -> Engine:
        """The engine of another adapter on the same weights, with that adapter's own template, stops and settings.

        They may be used at the same time. Closing one closes all. Raises UsageError for a name that is not there.
        """
        ...

    def prompt_text(self, conversation: Conversation) -> str:
        """The prompt as text, without the begin token."""
        ...

    def count_tokens(self, conversation: Conversation) -> int:
        """Tokens of the prompt that this conversation becomes."""
        ...

    def stream(
        self, conversation: Conversation, settings: GenerationSettings, *, cancel: Event | None = None
    ) -> Generator[Piece]:
        """Answer piece by piece: whole characters, nothing of a stop string. The last piece has the reply.

        A conversation that ends with an answer is gone on with. `cancel` stops within one token, and so does leaving
        the iterator (close it: `contextlib.closing`). Raises PromptTooLong.
        """
        ...

    def generate(
        self,
        conversations: Sequence[Conversation],
        settings: GenerationSettings,
        *,
        cancel: Event | None = None,
    ) -> list[Reply]:
        """Answer a batch, in order. Greedy answers do not depend on the rest of the batch (in float32)."""
        ...

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        """How likely the answers of these conversations are under the model."""
        ...

    def close(self) -> None:
        """Free the model's memory. The engine must not be used again."""
        ...


class OneModel:
    """Part of an engine that has no adapters to choose from."""

    adapters: tuple[str, ...] = ()
    adapter: str | None = None

    def using(self, adapter: str) -> Engine:
        """There is nothing to choose."""
        raise unknown_adapter(adapter, self.adapters)


def unknown_adapter(asked: str, there: Sequence[str]) -> UsageError:
    """The error of an adapter's name that nobody has."""
    return UsageError(
        tr(f"no adapter is called {asked}", f"没有名为 {asked} 的适配器"),
        where="adapter",
        remedy=tr("there are: ", "可用：") + ", ".join(there)
        if there
        else tr("load some: --adapter NAME=PATH", "先载入：--adapter 名字=路径"),
    )


class TemplatePrompts:
    """Prompts of an engine that renders them itself: its template, its tokenizer's ids."""

    tokenizer: TextTokenizer
    template: Template

    def _segments(self, conversation: Conversation) -> list[Segment]:
        """The prompt as training rendered it; of a conversation that ends with an answer, up to where that goes on."""
        if conversation.answer is None:
            return self.template.prompt(conversation)
        whole = self.template.render(conversation)
        answer = max(place for place, segment in enumerate(whole) if segment.row and segment.reply)
        return whole[: answer + 1]

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Token ids of the prompt."""
        return self.tokenizer.encode_segments(self._segments(conversation))[0]

    def prompt_text(self, conversation: Conversation) -> str:
        """The prompt as text, without begin and end tokens."""
        return "".join(segment.text for segment in self._segments(conversation))

    def count_tokens(self, conversation: Conversation) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids(conversation))
