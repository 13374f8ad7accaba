"""The model's own chat template (`template: tokenizer`), read through `apply_chat_template`.

The template is rendered with marks in place of the texts, once for each shape of conversation (which roles, how
many turns), and the marks are then filled with the row's texts: so it is known which characters the template
wrote and which came from a row, and a row costs no jinja. What is learned is found by differences: the rendering
of the conversation up to a question, with the slot for the answer open, must be how the whole rendering begins.
A chat template for which that is not so is refused: what it trains is not what it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tuoling.errors import TemplateError
from tuoling.files import sha256_text
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn
from tuoling.text.render import Learn, Segment, check_turns, plain_text

if TYPE_CHECKING:
    from tuoling.text.tokenizer import TextTokenizer

_MARK = re.compile("\ue0f0([0-9]+)\ue0f1")
_THOUGHT = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*(.*)", re.DOTALL)
_THOUGHTS = 100_000
"""The mark of turn n's thoughts is this much higher than the mark of its text."""


def _mark(number: int) -> str:
    return f"\ue0f0{number}\ue0f1"


class _Shape(NamedTuple):
    """A conversation's rendering with marks. replies: where each begins, and where its end token ends."""

    whole: str
    replies: list[tuple[int, int]]


class ChatTemplate:
    """Implements the protocol `Template` on top of a tokenizer's chat template."""

    id = "tokenizer"
    default_system: str | None = None  # the template writes its own

    def __init__(self, tokenizer: TextTokenizer) -> None:
        if not tokenizer.chat_template:
            raise TemplateError(
                tr("the tokenizer has no chat template", "分词器没有自带对话模板"),
                remedy=tr("choose one with template=...", "请用 template=... 选择一个模板"),
            )
        self._tokenizer = tokenizer
        self._shapes: dict[tuple[str, ...], _Shape] = {}
        self._strips = self._find_strips()
        shape = self._shape((Turn("user", "q"), Turn("assistant", "a")), None)
        begin, end = shape.replies[-1]
        self.stops: tuple[str, ...] = (tokenizer.split_special(shape.whole[begin:end])[-1].strip(),)

    def fingerprint(self) -> str:
        """Hash of the chat template's text."""
        return sha256_text("tokenizer:" + (self._tokenizer.chat_template or ""))

    def to_jinja(self, tokenizer: TextTokenizer) -> str | None:
        """The chat template as it came."""
        return tokenizer.chat_template

    def render(
        self, conversation: Conversation, *, learn: Learn = "all", train_on_inputs: bool = False
    ) -> list[Segment]:
        """As Template.render."""
        if conversation.is_plain_text:
            return plain_text(conversation.turns[0].text)
        turns = check_turns(conversation, ends_with="assistant")
        texts = self._texts(conversation.system, turns)
        shape = self._shape(turns, conversation.system)
        out: list[Segment] = []
        position = 0
        for number, (begin, end) in enumerate(shape.replies):
            learned = train_on_inputs or learn == "all" or number == len(shape.replies) - 1
            self._fill(out, shape.whole[position:begin], texts, learned=train_on_inputs, reply=False)
            self._fill(out, shape.whole[begin:end], texts, learned=learned, reply=True)
            position = end
        return out

    def prompt(self, conversation: Conversation) -> list[Segment]:
        """As Template.prompt. Earlier replies are tokenised exactly as `render` does."""
        if conversation.is_plain_text:
            return plain_text(conversation.turns[0].text)[:-1]
        turns = check_turns(conversation, ends_with="user")
        answered = Conversation((*conversation.turns, Turn("assistant", "")))
        texts = self._texts(conversation.system, turns)
        shape = self._shape(answered.exchanges, conversation.system)
        out: list[Segment] = []
        position = 0
        for begin, end in shape.replies[:-1]:
            self._fill(out, shape.whole[position:begin], texts, learned=False, reply=False)
            self._fill(out, shape.whole[begin:end], texts, learned=False, reply=True)
            position = end
        self._fill(out, shape.whole[position : shape.replies[-1][0]], texts, learned=False, reply=False)
        return out

    def _texts(self, system: str | None, turns: Sequence[Turn]) -> dict[int, str]:
        """Texts by the number of their mark: 0 is the system text."""
        texts = {0: system or ""}
        for number, turn in enumerate(turns, 1):
            thought = _thought(turn)
            if thought:
                texts[number + _THOUGHTS], texts[number] = thought.groups()
            else:
                texts[number] = turn.full_text
        return {number: text.strip() for number, text in texts.items()} if self._strips else texts

    @staticmethod
    def _fill(out: list[Segment], text: str, texts: dict[int, str], *, learned: bool, reply: bool) -> None:
        for index, piece in enumerate(_MARK.split(text)):
            if index % 2:
                out.append(Segment(texts[int(piece)], learned, row=True, reply=reply))
            elif piece:
                out.append(Segment(piece, learned, reply=reply))

    def _shape(self, turns: Sequence[Turn], system: str | None) -> _Shape:
        key = ("system" if system else "", *(turn.role + "+" * bool(_thought(turn)) for turn in turns))
        if key not in self._shapes:
            self._shapes[key] = self._read_shape(turns, bool(system))
        return self._shapes[key]

    def _read_shape(self, turns: Sequence[Turn], has_system: bool) -> _Shape:
        messages = [{"role": "system", "content": _mark(0)}] if has_system else []
        first = len(messages)
        for number, turn in enumerate(turns, 1):
            thought = f"<think>\n{_mark(number + _THOUGHTS)}\n</think>\n\n" if _thought(turn) else ""
            messages.append({"role": turn.role, "content": thought + _mark(number)})
        whole = self._apply(messages, opened=False)
        replies = []
        for number in range(2, len(turns) + 1, 2):
            prompt = self._apply(messages[: first + number - 1], opened=True)
            place = whole.find(_mark(number))
            if not whole.startswith(prompt) or place < len(prompt):
                raise self._refuse(prompt, whole)
            rest = whole[place + len(_mark(number)) :]
            following = _MARK.search(rest)
            length = self._end_length(rest[: following.start()] if following else rest)
            replies.append((len(prompt), place + len(_mark(number)) + length))
        return _Shape(whole, replies)

    def _end_length(self, text: str) -> int:
        """How far the reply's end goes into `text`: up to and with the first special token."""
        position = 0
        for part in self._tokenizer.split_special(text):
            position += len(part)
            if self._tokenizer.special_id(part.strip()) is not None:
                return position
        raise TemplateError(
            tr(
                "the model's own chat template puts no end token after an answer",
                "模型自带的对话模板在回答之后没有结束符",
            ),
            remedy=_remedy(),
        )

    def _find_strips(self) -> bool:
        """True if the template takes white space off the ends of messages."""
        whole = self._apply([{"role": "user", "content": f"  {_mark(0)}  "}], opened=True)
        return f"  {_mark(0)}  " not in whole

    def _apply(self, messages: list[dict[str, str]], *, opened: bool) -> str:
        try:
            text: Any = self._tokenizer.hf.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opened
            )
        except Exception as error:  # jinja's own errors, and whatever a template raises
            raise TemplateError(
                tr(
                    f"the model's own chat template refuses this conversation: {error}",
                    f"模型自带的对话模板不接受这段对话：{error}",
                ),
                remedy=_remedy(),
            ) from error
        return str(text)

    @staticmethod
    def _refuse(prompt: str, whole: str) -> TemplateError:
        pairs = enumerate(zip(prompt, whole, strict=False))
        same = next((index for index, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
        asked, trained = (_MARK.sub("…", text[max(0, same - 20) : same + 30]) for text in (prompt, whole))
        return TemplateError(
            tr(
                f"the model's own chat template asks with {asked!r} but trains {trained!r}: "
                "what is learned would not be what is asked",
                f"模型自带的对话模板提问时写 {asked!r}，训练时却写 {trained!r}：学到的与问到的不一致",
            ),
            remedy=_remedy(),
        )


def _thought(turn: Turn) -> re.Match[str] | None:
    """Thoughts and answer of a reply that shows both."""
    return _THOUGHT.match(turn.text) if turn.role == "assistant" and "</think>" in turn.text else None


def _remedy() -> str:
    return tr(
        "choose a template: template=chatml, qwen3_nothink, llama3, alpaca, ...",
        "请另选模板：template=chatml、qwen3_nothink、llama3、alpaca 等",
    )
