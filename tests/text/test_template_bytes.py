"""Every template's bytes against strings written down independently of the table."""

from __future__ import annotations

import pytest

from tuoling.errors import TemplateError
from tuoling.text.conversation import Conversation, Turn
from tuoling.text.templates import TEMPLATES, choose_template, get_template

SINGLE = Conversation((Turn("user", "Q"), Turn("assistant", "A")))
CONTEXT = Conversation((Turn("user", "Q", "C"), Turn("assistant", "A")))
TWO = Conversation((Turn("user", "Q1"), Turn("assistant", "A1"), Turn("user", "Q2"), Turn("assistant", "A2")))
SYSTEM = Conversation((Turn("system", "S"), *SINGLE.turns))

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
CHAT = (
    "The following is a conversation between an AI assistant called Assistant and a human user called User. "
    "The assistant is intelligent, knowledgeable and polite to answer questions of user.\n\n"
)
INTERACTION = "The following is a conversation between an AI assistant called Assistant and a human user called User.\n\n"
MARCH = (
    "The following is a conversation between an AI assistant called Bot and a human user called User."
    "Bot is is intelligent, knowledgeable, wise and polite.\n\n"
)
SERVE = (
    "Below is a history of instructions that describe tasks, paired with an input that provides further context. "
    "Write a response that appropriately completes the request by remembering the conversation history.\n    \n"
)
QWEN_SYSTEM = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
)
ZH_SYSTEM = "You are a helpful assistant. 你是一个乐于助人的助手。"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def show(template_id: str, conversation: Conversation) -> str:
    """What is rendered: [bos], [start] and [eos] where such a token stands."""
    segments = get_template(template_id).render(conversation)
    return "".join(s.text if s.kind in ("text", "token") else f"[{s.kind}]" for s in segments)


A1, AI = ALPACA.format(instruction="Q"), ALPACA_INPUT.format(instruction="Q", input="C")

GOLDEN_SINGLE = {
    "alpaca": f"[start]{A1}A[eos]",
    "alpaca_nl": f"[start]{A1}\nA[eos]",
    "vicuna_generate": f"[start]{A1}A[eos]",
    "vicuna_instruct_prompt_py": f"[start]{A1}A[eos]",
    "vicuna_chat": f"[start]{CHAT}User:Q\n\nAssistant:A[eos]",
    "vicuna_interaction": f"[start]{INTERACTION}### Instruction:\nQ\n\n### Response:A[eos]",
    "vicuna_bot_march": f"[start]{MARCH}### User:\nQ\n\n### Bot:A[eos]",
    "vicuna_cpp": "[bos] Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n[bos]### Instruction:\n\nQ\n### Response:\n\nA[eos]",
    "belle_card": "Human: Q\n\nAssistant:A[eos]",
    "belle_apr": "[bos]Human: Q\n\nAssistant: A[eos]",
    "belle_v2": "Human: \nQ\n\nAssistant: \nA[eos]",
    "belle_multiturn_rows": "Human:Q\nAssistant:A[eos]",
    "domain_bloom": "[bos]用户:Q\n\n助手:A[eos]",
    "alpaca_serve": f"[start]{SERVE}### Instruction:Q\n\n### Response:A[eos]",
    "point_alpaca_chat": "[start]Human: Q\n\nAssistant: A[eos]",
    "chatml": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
    "qwen": f"{QWEN_SYSTEM}<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
    "qwen3": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA<|im_end|>",
    "qwen3_nothink": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
    "llama2": "[bos][INST] Q [/INST] A [eos]",
    "llama2_zh": f"[bos][INST] <<SYS>>\n{ZH_SYSTEM}\n<</SYS>>\n\nQ [/INST] A [eos]",
    "llama3": "[bos]<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    "chatglm3": "[gMASK]sop<|user|>\n Q<|assistant|>\n A[eos]",
    "empty": "QA[eos]",
    "default": "[start]### User:\nQ\n\n### Assistant:\nA[eos]",
    "lf/alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nQ\n\n### Response:\nA[eos]",
    "lf/vicuna": f"{VICUNA}USER: Q ASSISTANT:A[eos]",
    "lf/default": "Human: Q[eos]\nAssistant:A[eos]",
    "lf/empty": "QA",
    "lf/llama2": "[bos][INST] Q [/INST]A[eos]",
    "lf/llama3": "[bos]<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    "lf/qwen": f"{QWEN_SYSTEM}<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
    "lf/belle": "[bos]Human: Q\n\nBelle: A[eos]",
    "lf/baichuan2": "<reserved_106>Q<reserved_107>A[eos]",
    "lf/gemma": "[bos]<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>",
    "lf/mistral": "[bos][INST] Q[/INST] A[eos]",
    "lf/deepseek": "[bos]User: Q\n\nAssistant:A[eos]",
    "lf/xverse": "Human: Q\n\nAssistant: A[eos]",
    "lf/ziya": "<human>:Q\n<bot>:A\n",
    "lf/chatglm3": "[gMASK]sop<|user|>\nQ<|assistant|>\nA[eos]",
    "lf/yi": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
}

GOLDEN_CONTEXT = {
    "alpaca": f"[start]{AI}A[eos]",
    "alpaca_nl": f"[start]{AI}\nA[eos]",
    "vicuna_generate": f"[start]{AI}A[eos]",
    "vicuna_instruct_prompt_py": f"[start]{AI}A[eos]".replace("tion:\nQ", "tion:Q").replace(
        "put:\nC", "put:C"
    ),
    "vicuna_interaction": f"[start]{INTERACTION}### Instruction:\nQ\n\n### Input:\nC\n\n### Response:A[eos]",
    "vicuna_chat": f"[start]{CHAT}User:Q\nC\n\nAssistant:A[eos]",
    "belle_apr": "[bos]Human: QC\n\nAssistant: A[eos]",
    "belle_v2": "Human: \nQC\n\nAssistant: \nA[eos]",
    "domain_bloom": "[bos]用户:QC\n\n助手:A[eos]",
    "lf/alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nQ\nC\n\n### Response:\nA[eos]",
}

GOLDEN_TWO = {
    "alpaca": "[start]"
    + ALPACA.format(instruction="Q1")
    + "A1[eos]\n\n### Instruction:\nQ2\n\n### Response:A2[eos]",
    "vicuna_chat": f"[start]{CHAT}User:Q1\n\nAssistant:A1\n\nUser:Q2\n\nAssistant:A2[eos]",
    "vicuna_bot_march": f"[start]{MARCH}User:\nQ1\n\nBot:A1\n\n### User:\nQ2\n\n### Bot:A2[eos]",
    "vicuna_interaction": f"[start]{INTERACTION}### Instruction:\nUser:Q1\nAssistant:A1\nQ2\n\n### Response:A2[eos]",
    "vicuna_instruct_prompt_py": "[start]"
    + ALPACA.format(instruction="User:Q1\n\nAssistant:A1\n\nUser:Q2\n\nAssistant:")
    + "A2[eos]",
    "belle_v2": "Human: \nQ1\n\nAssistant: \nA1[eos]Human: \nQ2\n\nAssistant: \nA2[eos]",
    "belle_multiturn_rows": "Human:Q1\nAssistant:A1\nHuman:Q2\nAssistant:A2[eos]",
    "domain_bloom": "[bos]用户:Q1\n\n助手:A1[eos]\n\n用户:Q2\n\n助手:A2[eos]",
    "alpaca_serve": f"[start]{SERVE}### Instruction:Q1\n\n### Response:A1\n\n### Instruction:Q2\n\n### Response:A2[eos]",
    "point_alpaca_chat": "[start]Human: Q1\n\nAssistant: A1\n\nHuman: Q2\n\nAssistant: A2[eos]",
    "chatml": "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>",
    "llama2": "[bos][INST] Q1 [/INST] A1 [eos][bos][INST] Q2 [/INST] A2 [eos]",
    "chatglm3": "[gMASK]sop<|user|>\n Q1<|assistant|>\n A1<|user|>\n Q2<|assistant|>\n A2[eos]",
    "vicuna_cpp": "[bos] " + ALPACA.split("###")[0] + "[bos]### Instruction:\n\nQ1\n### Response:\n\nA1[eos]"
    "[bos]### Instruction:\n\nQ2\n### Response:\n\nA2[eos]",
    "lf/baichuan2": "<reserved_106>Q1<reserved_107>A1<reserved_106>Q2<reserved_107>A2[eos]",
    "lf/alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nQ1\n\n### Response:\nA1[eos]\n\n"
    "### Instruction:\nQ2\n\n### Response:\nA2[eos]",
    "lf/llama2": "[bos][INST] Q1 [/INST]A1[eos][bos][INST] Q2 [/INST]A2[eos]",
    "lf/chatglm2": "[gMASK]sop[Round 0]\n\n问：Q1\n\n答：A1[Round 1]\n\n问：Q2\n\n答：A2[eos]",
}

GOLDEN_SYSTEM = {
    "alpaca": "[start]S\n\n### Instruction:\nQ\n\n### Response:A[eos]",
    "vicuna_chat": "[start]S\n\nUser:Q\n\nAssistant:A[eos]",
    "domain_bloom": "[bos]S\n\n用户:Q\n\n助手:A[eos]",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
    "qwen": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>",
    "llama2": "[bos][INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A [eos]",
    "lf/gemma": "[bos]<start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>",
    "lf/default": "System: S[eos]\nHuman: Q[eos]\nAssistant:A[eos]",
}

CASES = [
    (name, conversation, expected)
    for golden, conversation in (
        (GOLDEN_SINGLE, SINGLE),
        (GOLDEN_CONTEXT, CONTEXT),
        (GOLDEN_TWO, TWO),
        (GOLDEN_SYSTEM, SYSTEM),
    )
    for name, expected in golden.items()
]


@pytest.mark.parametrize(("template_id", "conversation", "expected"), CASES)
def test_bytes(template_id: str, conversation: Conversation, expected: str) -> None:
    assert show(template_id, conversation) == expected


def test_every_template_of_ours_has_golden_bytes() -> None:
    ours = {name for name in TEMPLATES if not name.startswith("lf/")}
    assert ours == {name for name in GOLDEN_SINGLE if not name.startswith("lf/")}
    assert len(ours) >= 25


def test_belle_card_strips_and_alpaca_does_not() -> None:
    padded = Conversation((Turn("user", " Q\n"), Turn("assistant", "A")))
    assert show("belle_card", padded) == "Human: Q\n\nAssistant:A[eos]"
    assert "### Instruction:\n Q\n\n\n###" in show("alpaca", padded)


def test_reply_with_its_own_thoughts_gets_no_empty_ones() -> None:
    thoughtful = Conversation((Turn("user", "Q"), Turn("assistant", "<think>\nhm\n</think>\n\nA")))
    assert show("qwen3", thoughtful).count("<think>") == 1


def test_unknown_id_names_the_nearest() -> None:
    with pytest.raises(TemplateError, match="domain_blom") as caught:
        get_template("domain_blom")
    assert "domain_bloom" in (caught.value.remedy or "")
    with pytest.raises(TemplateError) as caught:
        get_template("lf/qwen9")
    assert "lf/qwen" in (caught.value.remedy or "") and "tokenizer" in (caught.value.remedy or "")
    with pytest.raises(TemplateError) as caught:
        get_template("vicuna")  # LLaMA-Factory's, which is none of ours
    assert (caught.value.remedy or "").startswith("nearest: lf/vicuna")


@pytest.mark.parametrize(
    "turns",
    [(), ("assistant",), ("user", "user"), ("user", "assistant", "assistant"), ("system",), ("user",)],
)
def test_turns_out_of_order_are_refused(turns: tuple[str, ...]) -> None:
    conversation = Conversation(tuple(Turn(role, "x") for role in turns))  # type: ignore[arg-type]
    with pytest.raises(TemplateError, match="alternate"):
        get_template("alpaca").render(conversation)


def test_choice_of_a_template() -> None:
    def choose(requested: str | None, saved: str | None, family: str | None) -> tuple[str, str]:
        template, reason = choose_template(
            requested=requested, saved=saved, tokenizer=None, family_default=family
        )
        return template.id, reason

    assert choose("alpaca", None, "llama2")[0] == "alpaca"
    assert choose(None, "belle_v2", "llama2")[0] == "belle_v2"
    assert choose(None, None, "llama2")[0] == "llama2"
    assert choose(None, None, None)[0] == "default"
    template, reason = choose("alpaca", "belle_v2", None)
    assert template == "alpaca" and "belle_v2" in reason
    assert "belle_v2" not in choose("alpaca", "alpaca", None)[1]
