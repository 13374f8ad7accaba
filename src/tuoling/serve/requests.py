"""From the body of a request to an order: OpenAI's fields, and transformers' names for what OpenAI has not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tuoling.errors import UsageError
from tuoling.infer.engine import Engine, GenerationSettings
from tuoling.language import tr
from tuoling.serve.fields import Fields, whole_text
from tuoling.serve.jobs import Order, Prompt
from tuoling.serve.refusals import Refusal, bad, refusal_of
from tuoling.text.conversation import Conversation, Role, Turn

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_SAME = {"top_p": "top_p", "temperature": "temperature", "repetition_penalty": "repetition_penalty"}
_WHOLE = {"top_k": "top_k", "no_repeat_ngram_size": "no_repeat_ngram_size", "seed": "seed"}
_LENGTHS = ("max_completion_tokens", "max_tokens", "max_new_tokens")
IDLE = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "num_beams": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_KNOWN = (
    *("model", "messages", "prompt", "question", "n", "stream", "stream_options", "stop", "logprobs"),
    *("top_logprobs", "min_tokens", "min_new_tokens", "do_sample", *_SAME, *_WHOLE, *_LENGTHS),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int = 4096
    choices: int = 16
    stops: int = 16
    top_logprobs: int = 20
    prompts: int = 16
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Names:
    """Model names a request may use, and the engine that answers to each."""

    engines: Mapping[str, Engine]
    main: str

    def engine(self, name: str) -> Engine:
        """Refusal (404) for a name that is not served."""
        if name not in self.engines:
            have = ", ".join(self.engines)
            raise Refusal(
                404,
                tr(
                    f"no model is called {name!r}; there are: {have}",
                    f"没有名为 {name!r} 的模型；可用：{have}",
                ),
                "model",
                "model_not_found",
            )
        return self.engines[name]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request that was understood. logprobs: whether they are wanted in the answer."""

    order: Order
    model: str
    stream: bool = False
    usage: bool = False


class Reader:
    """Reads requests for one server."""

    def __init__(self, names: Names, limits: Limits) -> None:
        self.names = names
        self.limits = limits

    def _defaults(self, engine: Engine) -> GenerationSettings:
        """The engine's own settings within the limits; beams are not for many callers."""
        own = engine.defaults
        longest = min(own.max_new_tokens, self.limits.max_tokens)
        shortest = min(own.min_new_tokens, longest)
        return replace(own, num_beams=1, max_new_tokens=longest, min_new_tokens=shortest)

    def chat(self, body: Mapping[str, Any], caller: str) -> Wanted:
        """/v1/chat/completions"""
        fields = Fields(body)
        model = self._model(fields)
        messages = fields.take("messages")
        wants_logs, best = (
            fields.flag("logprobs"),
            fields.integer("top_logprobs", 0, self.limits.top_logprobs),
        )
        if best is not None and not wants_logs:
            raise bad(
                tr("top_logprobs needs logprobs=true", "使用 top_logprobs 需要 logprobs=true"), "top_logprobs"
            )
        conversation = self.conversation(messages, self.names.engine(model).system)
        return self._wanted(fields, (conversation,), model, caller, (best or 0) if wants_logs else None)

    def completion(self, body: Mapping[str, Any], caller: str) -> Wanted:
        """/v1/completions: the text goes on as it is, without a template."""
        fields = Fields(body)
        model = self._model(fields)
        prompts = self._prompts(fields.take("prompt"))
        return self._wanted(
            fields, prompts, model, caller, fields.integer("logprobs", 0, self.limits.top_logprobs)
        )

    def question(self, body: Mapping[str, Any], caller: str) -> Wanted:
        """The plain endpoints: {"question"}, and settings if need be."""
        fields = Fields(body)
        model = fields.text("model") or self.names.main
        text = fields.text("question")
        if text is None:
            raise bad(tr("question is missing", "缺少 question"), "question", "missing_parameter")
        system = fields.text("system")
        conversation = _with_system(
            [Turn("user", text)], self.names.engine(model).system if system is None else system
        )
        return self._wanted(fields, (conversation,), model, caller, None)

    # -- parts -------------------------------------------------------------------------------------------------

    def _model(self, fields: Fields) -> str:
        model = fields.text("model")
        if model is None:
            have = ", ".join(self.names.engines)
            raise bad(
                tr(f"model is missing; there are: {have}", f"缺少 model；可用：{have}"),
                "model",
                "missing_parameter",
            )
        return model

    def _wanted(
        self, fields: Fields, prompts: tuple[Prompt, ...], model: str, caller: str, logprobs: int | None
    ) -> Wanted:
        engine = self.names.engine(model)
        settings, explicit = self._settings(fields, self._defaults(engine))
        choices = fields.integer("n", 1, self.limits.choices) or 1
        stream = fields.flag("stream")
        if "stream_options" in fields and not stream:
            raise bad(
                tr("stream_options needs stream=true", "使用 stream_options 需要 stream=true"),
                "stream_options",
            )
        options = fields.object("stream_options")
        usage = options.flag("include_usage")
        options.end(("include_obfuscation",), {}, ("include_usage",))
        fields.end(IDLE, NEUTRAL, _KNOWN)
        order = Order(
            engine,
            prompts,
            settings,
            choices=choices,
            logprobs=logprobs,
            caller=caller,
            timeout_s=self.limits.timeout_s,
            whole_room=explicit,
        )
        return Wanted(order, model, stream, usage)

    def _settings(self, fields: Fields, defaults: GenerationSettings) -> tuple[GenerationSettings, bool]:
        """Settings, and whether the request names its own length."""
        values: dict[str, Any] = {ours: fields.number(theirs) for theirs, ours in _SAME.items()}
        values |= {ours: fields.integer(theirs, 0, 2**63 - 1) for theirs, ours in _WHOLE.items()}
        lengths = [fields.integer(name, 1, self.limits.max_tokens) for name in _LENGTHS]
        values["max_new_tokens"] = next((length for length in lengths if length is not None), None)
        shortest = [
            fields.integer(name, 0, self.limits.max_tokens) for name in ("min_tokens", "min_new_tokens")
        ]
        values["min_new_tokens"] = next((length for length in shortest if length is not None), None)
        if "do_sample" in fields:
            values["do_sample"] = fields.flag("do_sample")
        values["stop"] = self._stops(fields.take("stop"))
        try:
            return defaults.with_values(values), values["max_new_tokens"] is not None
        except UsageError as error:
            raise refusal_of(error) from error

    def _stops(self, value: Any) -> tuple[str, ...] | None:
        if value is None:
            return None
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or len(texts) > self.limits.stops:
            most = self.limits.stops
            raise bad(
                tr(f"stop must be a text or up to {most} texts", f"stop 必须是字符串或至多 {most} 个字符串"),
                "stop",
            )
        return tuple(whole_text(text, "stop") for text in texts if text != "")

    def _prompts(self, value: Any) -> tuple[Prompt, ...]:
        """A text, token ids, or a list of either."""
        if value is None:
            raise bad(tr("prompt is missing", "缺少 prompt"), "prompt", "missing_parameter")
        if isinstance(value, str) or (isinstance(value, list) and value and _whole_numbers(value)):
            value = [value]
        if not isinstance(value, list) or not 1 <= len(value) <= self.limits.prompts:
            most = self.limits.prompts
            raise bad(
                tr(
                    f"prompt must be a text, token ids, or 1 to {most} of them",
                    f"prompt 必须是字符串、token 编号列表，或其 1 到 {most} 个组成的列表",
                ),
                "prompt",
            )
        prompts: list[Prompt] = []
        for one in value:
            if isinstance(one, list) and one and _whole_numbers(one):
                prompts.append(tuple(one))
            else:
                prompts.append(Conversation((Turn("text", whole_text(one, "prompt")),)))
        return tuple(prompts)

    def conversation(self, messages: Any, system: str | None = None) -> Conversation:
        """OpenAI's messages: system first if at all, then user and assistant in turn, a user's at the end.

        system: the text where they have none.
        """
        if not isinstance(messages, list) or not messages:
            raise bad(tr("messages must be a list that is not empty", "messages 必须是非空列表"), "messages")
        turns: list[Turn] = []
        for number, message in enumerate(messages):
            where = f"messages[{number}]"
            if not isinstance(message, dict):
                raise bad(tr(f"{where} must be an object", f"{where} 必须是对象"), where, "invalid_type")
            role = _ROLES.get(message.get("role") if isinstance(message.get("role"), str) else "")  # type: ignore[arg-type]
            if role is None:
                roles = ", ".join(_ROLES)
                raise bad(
                    tr(f"{where}.role must be one of: {roles}", f"{where}.role 必须是其一：{roles}"),
                    f"{where}.role",
                )
            text = _content(message.get("content"), f"{where}.content")
            if role == "system":
                if number:
                    raise bad(
                        tr(f"{where}: a system message must come first", f"{where}：system 消息只能放在最前"),
                        where,
                    )
                system = text
                continue
            wanted = "assistant" if len(turns) % 2 else "user"
            if role != wanted:
                raise bad(
                    tr(
                        f"{where}: roles must alternate, {wanted} is expected here and not {role}",
                        f"{where}：user 与 assistant 必须交替，此处应为 {wanted} 而不是 {role}",
                    ),
                    f"{where}.role",
                )
            turns.append(Turn(role, text))
        if len(turns) % 2 == 0:
            raise bad(
                tr("messages must end with a user's message", "messages 必须以 user 消息结尾"), "messages"
            )
        return _with_system(turns, system)


def _with_system(turns: list[Turn], system: str | None) -> Conversation:
    return Conversation((*([Turn("system", system)] if system else []), *turns))


def _content(value: Any, where: str) -> str:
    """A text, or OpenAI's list of text parts."""
    if not isinstance(value, list):
        return whole_text(value, where)
    parts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise bad(
                tr(
                    f"{where}[{number}]: only parts of type text are offered",
                    f"{where}[{number}]：只支持 text 类型",
                ),
                f"{where}[{number}]",
                "unsupported",
            )
        parts.append(whole_text(part.get("text"), f"{where}[{number}].text"))
    return "".join(parts)


def _whole_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)
