"""Every template under its id, as data; found by id, or chosen for a model.

A new template is one entry in `_OWN`. What the marks and fields mean stands in `render.py`. Where a template's
source says nothing, this file decides, once for all of them:

- A system text replaces the template's own opening sentence where it has one, else stands in front of the
  first question, followed by an empty line.
- Templates made for one question and one answer repeat their block; the end token and an empty line stand
  between the answer and the next question.
- A template whose source ends only the last reply (vicuna_chat, belle_multiturn_rows, ...) keeps that: earlier
  replies are learned without an end token, or not at all with `learn: last`.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Protocol

from tuoling.errors import TemplateError
from tuoling.language import tr
from tuoling.text.conversation import Conversation
from tuoling.text.lf_templates import LF_TEMPLATES
from tuoling.text.render import Forms, FormTemplate, Learn, Segment

if TYPE_CHECKING:
    from tuoling.text.tokenizer import TextTokenizer

__all__ = ["TEMPLATES", "Forms", "Learn", "Segment", "Template", "choose_template", "get_template"]


class Template(Protocol):
    """What training, chat and prediction ask of a template."""

    id: str
    stops: tuple[str, ...]
    """Strings that end a reply besides the end token."""
    default_system: str | None

    def render(
        self, conversation: Conversation, *, learn: Learn = "all", train_on_inputs: bool = False
    ) -> list[Segment]:
        """Segments of a whole conversation; raises TemplateError if the turns are out of order."""
        ...

    def prompt(self, conversation: Conversation) -> list[Segment]:
        """Segments up to the open slot for the answer: exactly what `render` begins with."""
        ...

    def fingerprint(self) -> str:
        """Hash of the template's bytes."""
        ...

    def to_jinja(self, tokenizer: TextTokenizer) -> str | None:
        """The format as a jinja chat template for other tools; None where it cannot be written as one."""
        ...


_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_ALPACA_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_ALPACA_STOPS = ("\n### Instruction:", "\n### Input:")
_HUMAN_STOPS = ("\nHuman:",)
_USER_STOPS = ("\nUser:",)
_THINK = "<think>\n\n</think>\n\n"


def _alpaca(name: str, append: str) -> Forms:
    return Forms(
        id=name,
        head="{start}",
        default_system=_ALPACA,
        context_system=_ALPACA_CONTEXT,
        user="### Instruction:\n{user}\n\n### Response:" + append,
        user_context="### Instruction:\n{user}\n\n### Input:\n{context}\n\n### Response:" + append,
        after="\n\n",
        stops=_ALPACA_STOPS,
    )


def _chatml(name: str, *, system: str | None = None, think: str = "") -> Forms:
    return Forms(
        id=name,
        system="<|im_start|>system\n{system}<|im_end|>\n",
        default_system=system,
        user="<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
        think=think,
        stops=("<|im_end|>",),
    )


def _llama2(name: str, system: str | None = None) -> Forms:
    return Forms(
        id=name,
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        default_system=system,
        user="{bos}[INST] {system}{user} [/INST]",
        reply=" {reply} ",
        stops=("[INST]",),
    )


_OWN: tuple[Forms, ...] = (
    _alpaca("alpaca", ""),
    _alpaca("alpaca_nl", "\n"),
    _alpaca("vicuna_generate", ""),
    Forms(
        id="vicuna_instruct_prompt_py",
        head="{start}",
        default_system=_ALPACA,
        context_system=_ALPACA_CONTEXT,
        user="### Instruction:\n{user}\n\n### Response:",
        user_context="### Instruction:{user}\n\n### Input:{context}\n\n### Response:",
        later="### Instruction:\n{history}User:{user}\n\nAssistant:\n\n### Response:",
        history="User:{user}\n\nAssistant:",
        end_between="",
        after="\n\n",
        stops=(*_ALPACA_STOPS, *_USER_STOPS),
    ),
    Forms(
        id="vicuna_chat",
        head="{start}",
        default_system="The following is a conversation between an AI assistant called Assistant and a human user "
        "called User. The assistant is intelligent, knowledgeable and polite to answer questions of user.",
        user="User:{user}\n\nAssistant:",
        end_between="",
        after="\n\n",
        stops=_USER_STOPS,
        strip=True,
    ),
    Forms(
        id="vicuna_interaction",
        head="{start}",
        default_system="The following is a conversation between an AI assistant called Assistant and a human user "
        "called User.",
        user="### Instruction:\n{user}\n\n### Response:",
        user_context="### Instruction:\n{user}\n\n### Input:\n{context}\n\n### Response:",
        later="### Instruction:\n{history}{user}\n\n### Response:",
        history="User:{user}\nAssistant:",
        end_between="",
        after="\n",
        stops=(*_ALPACA_STOPS, *_USER_STOPS),
    ),
    Forms(
        id="vicuna_bot_march",
        head="{start}",
        default_system="The following is a conversation between an AI assistant called Bot and a human user called "
        "User.Bot is is intelligent, knowledgeable, wise and polite.",
        user="### User:\n{user}\n\n### Bot:",
        history="User:\n{user}\n\nBot:",
        end_between="",
        after="\n\n",
        stops=("\n### User:", *_USER_STOPS),
    ),
    Forms(
        id="vicuna_cpp",
        head="{bos}",
        default_system=" " + _ALPACA,
        user="{bos}### Instruction:\n\n{user}\n### Response:\n\n",
        stops=_ALPACA_STOPS,
    ),
    Forms(
        id="belle_card",
        user="Human: {user}{context}\n\nAssistant:",
        after="\n\n",
        stops=_HUMAN_STOPS,
        strip=True,
    ),
    Forms(
        id="belle_apr",
        head="{bos}",
        user="Human: {user}{context}\n\nAssistant: ",
        after="\n\n",
        stops=_HUMAN_STOPS,
    ),
    Forms(id="belle_v2", user="Human: \n{user}{context}\n\nAssistant: \n", stops=_HUMAN_STOPS),
    Forms(
        id="belle_multiturn_rows",
        system="{system}\n",
        user="Human:{user}\nAssistant:",
        end_between="",
        after="\n",
        stops=_HUMAN_STOPS,
    ),
    Forms(
        id="domain_bloom",
        head="{bos}",
        user="用户:{user}{context}\n\n助手:",
        after="\n\n",
        stops=("\n用户:",),
    ),
    Forms(
        id="alpaca_serve",
        head="{start}",
        system="{system}\n    \n",
        default_system="Below is a history of instructions that describe tasks, paired with an input that provides "
        "further context. Write a response that appropriately completes the request by remembering the "
        "conversation history.",
        user="### Instruction:{user}\n\n### Response:",
        end_between="",
        after="\n\n",
        stops=_ALPACA_STOPS,
    ),
    Forms(
        id="point_alpaca_chat",
        head="{start}",
        user="Human: {user}\n\nAssistant: ",
        end_between="",
        after="\n\n",
        stops=_HUMAN_STOPS,
    ),
    _chatml("chatml"),
    _llama2("llama2"),
    _llama2("llama2_zh", "You are a helpful assistant. 你是一个乐于助人的助手。"),
    Forms(
        id="llama3",
        head="{bos}",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        stops=("<|eot_id|>",),
    ),
    _chatml("qwen", system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    _chatml("qwen3", think=_THINK),
    _chatml("qwen3_nothink"),
    Forms(
        id="chatglm3",
        head="{token:[gMASK]}{token:sop}",
        system="<|system|>\n {system}",
        user="<|user|>\n {user}<|assistant|>",
        reply="\n {reply}",
        end_between="",
        stops=("<|user|>", "<|observation|>"),
    ),
    Forms(id="empty", user="{user}", system="{system}\n"),
    Forms(
        id="default",
        head="{start}",
        user="### User:\n{user}\n\n### Assistant:\n",
        after="\n\n",
        stops=("\n### User:",),
    ),
)

TEMPLATES: dict[str, Template] = {forms.id: FormTemplate(forms) for forms in (*_OWN, *LF_TEMPLATES)}

_ALIASES = {
    "vicuna_instruct": "vicuna_instruct_prompt_py",
    "none": "empty",
    "qwen2": "qwen",
    "qwen2.5": "qwen",
}


def get_template(id: str, tokenizer: TextTokenizer | None = None) -> Template:
    """The template of this id. `tokenizer` is the id of the model's own chat template and needs the tokenizer.

    Raises TemplateError: unknown id (with the nearest ids), or a chat template that cannot be used.
    """
    if id == "tokenizer":
        from tuoling.text.chat_template import ChatTemplate

        if tokenizer is None:
            raise TemplateError(
                tr("template `tokenizer` needs a tokenizer", "模板 `tokenizer` 需要分词器"),
                remedy=tr("name a model or tokenizer folder", "请给出模型或分词器目录"),
            )
        return ChatTemplate(tokenizer)
    found = TEMPLATES.get(_ALIASES.get(id, id))
    if found is not None:
        return found
    names = [*TEMPLATES, *_ALIASES, "tokenizer"]
    near = difflib.get_close_matches(id, names, n=4, cutoff=0.5)
    if not id.startswith("lf/") and f"lf/{id}" in TEMPLATES:
        near.insert(0, f"lf/{id}")
    hint = ", ".join(near) or ", ".join(names[:12]) + " ..."
    remedy = tr(f"nearest: {hint}", f"相近的模板：{hint}")
    if id.startswith("lf/"):
        remedy += "\n" + tr(
            "or `template: tokenizer`, the model's own chat template",
            "或写 `template: tokenizer`，使用模型自带的对话模板",
        )
    raise TemplateError(tr(f"unknown template `{id}`", f"没有名为 `{id}` 的模板"), remedy=remedy)


def choose_template(
    *, requested: str | None, saved: str | None, tokenizer: TextTokenizer | None, family_default: str | None
) -> tuple[Template, str]:
    """The template to use, and one sentence that says why.

    In order: what the user asked for; what is saved with the model or adapter; the tokenizer's own chat
    template; the family's default; `default`.
    """
    if requested:
        template = get_template(requested, tokenizer)
        if saved and get_template(saved, tokenizer).fingerprint() != template.fingerprint():
            return template, tr(
                f"template {requested}, as asked; what is saved here was made with {saved}",
                f"按要求使用模板 {requested}；而这里保存的模型是用 {saved} 训练的",
            )
        return template, tr(f"template {requested}, as asked", f"按要求使用模板 {requested}")
    if saved:
        return get_template(saved, tokenizer), tr(
            f"template {saved}, saved with the model", f"使用与模型一起保存的模板 {saved}"
        )
    trouble = ""
    if tokenizer is not None and tokenizer.chat_template:
        try:
            return get_template("tokenizer", tokenizer), tr(
                "the model's own chat template", "使用模型自带的对话模板"
            )
        except TemplateError as error:
            trouble = tr(
                f" (its own chat template: {error.problem})", f"（模型自带的对话模板：{error.problem}）"
            )
    if family_default:
        return get_template(family_default, tokenizer), tr(
            f"template {family_default}, the default of this model family{trouble}",
            f"使用该模型系列的默认模板 {family_default}{trouble}",
        )
    return get_template("default"), tr(
        f"template default: the model names none{trouble}", f"模型没有指明模板，使用 default{trouble}"
    )
