"""One renderer for every template: a conversation becomes segments, for training and for chat alike.

A template is data (`Forms`): short strings in which these marks stand for something:

    {bos}      the tokenizer's begin token, if it has one
    {start}    the begin token, only if this tokenizer itself puts one in front of text
    {eos}      the tokenizer's end token
    {system}   in `system`: the system text; in another form: the whole rendered system block
    {user}     the question (with its context on a new line, where the form has no {context})
    {context}  the material the question works on (Alpaca's `input`)
    {reply}    the answer
    {history}  the earlier turns, where they stand inside the last question
    {round}    the number of the question, from 0
    {token:X}  X as one token, where the vocabulary has it
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from tuoling.errors import TemplateError
from tuoling.files import sha256_text
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn

if TYPE_CHECKING:
    from tuoling.text.tokenizer import TextTokenizer

Learn = Literal["all", "last"]
Kind = Literal["text", "bos", "start", "eos", "token"]


class Segment(NamedTuple):
    """A stretch of text (or one special token) and whether it is learned.

    row:   the text comes from a row or from a person: special tokens written in it stay plain text.
    reply: belongs to the assistant's answer. Text is tokenised apart from the text around it exactly where
           `reply` changes, so that a prompt's ids do not depend on the answer that follows.
    fresh: tokenised as the start of a new text (LLaMA-Factory tokenises each slot by itself).
    """

    text: str
    learned: bool
    kind: Kind = "text"
    row: bool = False
    reply: bool = False
    fresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """A template as data. Every field but `id` and `user` has the common case as its default."""

    id: str
    user: str
    """A question and the open slot for its answer."""
    user_context: str | None = None
    """The same for a question with context."""
    later: str | None = None
    """The last question when there are earlier turns."""
    history: str | None = None
    """An earlier question."""
    head: str = ""
    system: str = "{system}\n\n"
    default_system: str | None = None
    context_system: str | None = None
    """The default system text when the first question has context."""
    reply: str = "{reply}"
    think: str = ""
    """Stands before a reply that has no thoughts of its own."""
    end: str = "{eos}"
    """Ends a reply, and is learned with it."""
    end_between: str | None = None
    """The same for a reply that is not the last; "" where the format ends only the last one."""
    after: str = ""
    """Between a finished reply and the next question. Never learned."""
    stops: tuple[str, ...] = ()
    strip: bool = False
    """Take white space off both ends of questions and replies."""
    slots: bool = False
    """Each form is tokenised by itself (LLaMA-Factory)."""


MARK = re.compile(r"\{(bos|start|eos|system|user|context|reply|history|round|token:[^}]+)\}")
_TOKENS: dict[str, Kind] = {"bos": "bos", "start": "start", "eos": "eos"}


class Slot(NamedTuple):
    """A mark of a form that is filled with a row's text; `fresh` as in Segment."""

    name: str
    fresh: bool = False


Item = Segment | Slot


class Form:
    """A form cut into constant segments (marked as not learned) and slots."""

    def __init__(self, text: str, *, reply: bool = False, slots: bool = False) -> None:
        items: list[Item] = []
        for index, piece in enumerate(MARK.split(text)):
            # LLaMA-Factory's slots: every stretch of text that follows no text is a text of its own
            fresh = slots and (not items or (isinstance(items[-1], Segment) and items[-1].kind != "text"))
            if index % 2 == 0:
                if piece:
                    items.append(Segment(piece, False, reply=reply, fresh=fresh))
            elif piece in _TOKENS:
                items.append(Segment("", False, _TOKENS[piece], reply=reply))
            elif piece.startswith("token:"):
                items.append(Segment(piece[6:], False, "token", reply=reply))
            else:
                items.append(Slot(piece, fresh))
        self.items: tuple[Item, ...] = tuple(items)
        self.names = {item.name for item in items if isinstance(item, Slot)}

    def constants(self, learned: bool) -> list[Segment]:
        """The form's own segments, without its slots."""
        return [item._replace(learned=learned) for item in self.items if isinstance(item, Segment)]

    def split_at_history(self) -> tuple[Form, Form]:
        """The form in front of {history}, and behind it."""
        before, after = Form(""), Form("")
        before.items, after.items, before.names, after.names = (), self.items, self.names, self.names
        for index, item in enumerate(self.items):
            if isinstance(item, Slot) and item.name == "history":
                before.items, after.items = self.items[:index], self.items[index + 1 :]
        return before, after


class FormTemplate:
    """A template made of `Forms`. Implements the protocol `Template`."""

    def __init__(self, forms: Forms) -> None:
        self.forms = forms
        self.id = forms.id
        self.stops = forms.stops
        self.default_system = forms.default_system
        slots = forms.slots
        self._head = Form(forms.head, slots=slots).constants(False)
        self._system = Form(forms.system, slots=slots)
        self._user = Form(forms.user, slots=slots)
        self._user_context = Form(forms.user_context or forms.user, slots=slots)
        self._later = Form(forms.later, slots=slots) if forms.later is not None else None
        self._history = Form(forms.history, slots=slots) if forms.history is not None else None
        self._reply = Form(forms.reply, reply=True, slots=slots and not forms.think)
        self._think = Segment(forms.think, False, reply=True)
        between = forms.end if forms.end_between is None else forms.end_between
        self._ends = {
            (last, learned): Form(forms.end if last else between, reply=True).constants(learned)
            for last in (True, False)
            for learned in (True, False)
        }
        self._after = Form(forms.after, slots=slots and forms.end == "{eos}").constants(False)
        used = [self._user, self._user_context, self._later, self._history]
        self._system_inside = any(form is not None and "system" in form.names for form in used)

    def fingerprint(self) -> str:
        """Hash of the template's bytes: part of the key of a token store."""
        return sha256_text(json.dumps(asdict(self.forms), ensure_ascii=False, sort_keys=True))

    def to_jinja(self, tokenizer: TextTokenizer) -> str | None:
        """The same format as a jinja chat template; None where it cannot be written as one."""
        from tuoling.text.jinja import forms_to_jinja

        bos = tokenizer.hf.bos_token or ""
        start = bos if tokenizer.adds_bos else ""
        return forms_to_jinja(self.forms, bos=bos, eos=tokenizer.hf.eos_token or "", start=start)

    def render(
        self, conversation: Conversation, *, learn: Learn = "all", train_on_inputs: bool = False
    ) -> list[Segment]:
        """Segments of a whole conversation that ends with an answer (or of one plain text)."""
        if conversation.is_plain_text:
            return plain_text(conversation.turns[0].text)
        turns = check_turns(conversation, ends_with="assistant")
        out = self._render(conversation.system, turns, learn == "all")
        return [segment._replace(learned=True) for segment in out] if train_on_inputs else out

    def prompt(self, conversation: Conversation) -> list[Segment]:
        """Segments up to the open slot for the answer: what `render` begins with once there is one."""
        if conversation.is_plain_text:
            return plain_text(conversation.turns[0].text)[:-1]
        turns = check_turns(conversation, ends_with="user")
        return self._render(conversation.system, turns, False)

    def _render(self, system: str | None, turns: Sequence[Turn], learn_all: bool) -> list[Segment]:
        forms, out = self.forms, list(self._head)
        last = len(turns) - 1 - (turns[-1].role == "assistant")
        default = forms.context_system if turns[0].context and forms.context_system else forms.default_system
        block = self._system_block(system or default)
        if not self._system_inside:
            out.extend(block)
            block = []
        form = self._question_form(turns[last]) if not last or self._later is None else self._later
        if "history" in form.names:
            opening, form = form.split_at_history()
            block = self._ask(out, opening, turns[last], block, last // 2)
        for index in range(0, last, 2):
            question = turns[index]
            earlier = self._history if self._history is not None else self._question_form(question)
            block = self._ask(out, earlier, question, block, index // 2)
            self._answer(out, turns[index + 1].text, last=False, learned=learn_all)
            out.extend(self._after)
        self._ask(out, form, turns[last], block, last // 2)
        if last + 1 < len(turns):
            self._answer(out, turns[-1].text, last=True, learned=True)
        return out

    def _question_form(self, turn: Turn) -> Form:
        return self._user_context if turn.context else self._user

    def _system_block(self, text: str | None) -> list[Segment]:
        if not text:
            return []
        return [
            item if isinstance(item, Segment) else Segment(text, False, row=True, fresh=item.fresh)
            for item in self._system.items
        ]

    def _ask(
        self, out: list[Segment], form: Form, turn: Turn, block: list[Segment], number: int
    ) -> list[Segment]:
        """Append a question; return what is left of the system block (nothing once it was placed)."""
        for item in form.items:
            if isinstance(item, Segment):
                out.append(item)
            elif item.name == "system":
                out.extend(block)
                block = []
            elif item.name == "round":
                out.append(Segment(str(number), False))
            else:
                if item.name == "context":
                    text = turn.context
                else:
                    text = turn.text if "context" in form.names else turn.full_text
                text = text.strip() if self.forms.strip else text
                out.append(Segment(text, False, row=True, fresh=item.fresh))
        return block

    def _answer(self, out: list[Segment], text: str, *, last: bool, learned: bool) -> None:
        text = text.strip() if self.forms.strip else text
        if self.forms.think and not has_thoughts(text, self.forms.think):
            out.append(self._think._replace(learned=learned))
        for item in self._reply.items:
            if isinstance(item, Slot):
                out.append(Segment(text, learned, row=True, reply=True, fresh=item.fresh))
            else:
                out.append(item._replace(learned=learned))
        out.extend(self._ends[last, learned])


def has_thoughts(reply: str, think: str) -> bool:
    """True if a reply already holds one of the two marks of the empty thought `think`."""
    return any(mark in reply for mark in think.split())


def plain_text(text: str) -> list[Segment]:
    """Plain text for continued pre-training: the tokenizer's own begin token, the text, the end token."""
    return [Segment("", False, "start"), Segment(text, True, row=True), Segment("", True, "eos")]


def check_turns(conversation: Conversation, *, ends_with: Literal["user", "assistant"]) -> Sequence[Turn]:
    """The turns after the system turn, if user and assistant alternate and the last is as asked."""
    turns = conversation.exchanges
    roles = [turn.role for turn in turns]
    right = [("user", "assistant")[index % 2] for index in range(len(turns))]
    if not turns or roles != right or roles[-1] != ends_with:
        found = ", ".join(turn.role for turn in conversation.turns) or tr("nothing", "空")
        raise TemplateError(
            tr(
                f"a conversation must alternate user, assistant and end with {ends_with}; found: {found}",
                f"对话必须由 user、assistant 交替组成，并以 {ends_with} 结尾；实际是：{found}",
            )
        )
    return turns
