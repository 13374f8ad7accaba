"""LLaMA-Factory's template ids, under `lf/`: the bytes its own renderer makes, as data.

LLaMA-Factory tokenises every slot by itself (`slots=True`), so a sentencepiece tokenizer puts its word mark in
front of each. Two things differ on purpose: white space after an end mark is not learned (nobody generates
it), and templates that end only the last reply ("efficient eos") learn no end token for the earlier ones.
"""

from __future__ import annotations

from tuoling.text.render import Forms

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_INTERN = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language "
    "chosen by the user such as English and 中文."
)
_XUANYUAN = (
    "以下是用户和人工智能助手之间的对话。用户以Human开头，人工智能助手以Assistant开头，"
    "会对人类提出的问题给出有帮助、高质量、详细和礼貌的回答，并且总是拒绝参与与不道德、"
    "不安全、有争议、政治敏感等相关的话题、问题和指示。\n"
)
_DEEPSEEK_CODER = (
    "You are an AI programming assistant, utilizing the DeepSeek Coder model, "
    "developed by DeepSeek Company, and you only answer questions related to computer science. "
    "For politically sensitive questions, security and privacy issues, "
    "and other non-computer science questions, you will refuse to answer.\n"
)


def _lf(name: str, user: str, *, efficient_eos: bool = False, **forms: object) -> Forms:
    if efficient_eos:
        forms = {"end_between": "", **forms}
    return Forms(id=f"lf/{name}", user=user, slots=True, **{"system": "{system}", **forms})  # type: ignore[arg-type]


def _chatml(
    name: str, *, system: str | None = None, head: str = "", think: str = "", more: tuple[str, ...] = ()
) -> Forms:
    return _lf(
        name,
        "<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
        head=head,
        system="<|im_start|>system\n{system}<|im_end|>\n",
        default_system=system,
        end="<|im_end|>",
        after="\n",
        think=think,
        stops=("<|im_end|>", *more),
    )


def _gemma(name: str) -> Forms:
    return _lf(
        name,
        "<start_of_turn>user\n{system}{user}<end_of_turn>\n<start_of_turn>model\n",
        head="{bos}",
        system="{system}\n\n",
        end="<end_of_turn>",
        after="\n",
        stops=("<end_of_turn>",),
    )


def _llama3(name: str) -> Forms:
    return _lf(
        name,
        "<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        head="{bos}",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        end="<|eot_id|>",
        stops=("<|eot_id|>", "<|eom_id|>"),
    )


def _llama2(name: str, system: str | None = None) -> Forms:
    return _lf(
        name,
        "{bos}[INST] {system}{user} [/INST]",
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        default_system=system,
    )


def _glm4(name: str, think: str = "") -> Forms:
    return _lf(
        name,
        "<|user|>\n{user}<|assistant|>",
        efficient_eos=True,
        head="[gMASK]<sop>",
        system="<|system|>\n{system}",
        reply="\n{reply}",
        think=think,
        stops=("<|user|>", "<|observation|>"),
    )


_THINK = "<think>\n\n</think>\n\n"

LF_TEMPLATES: tuple[Forms, ...] = (
    _lf(
        "alpaca",
        "### Instruction:\n{user}\n\n### Response:\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
        after="\n\n",
    ),
    _lf(
        "aquila",
        "Human: {user}###Assistant:",
        system="System: {system}###",
        default_system="A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.",
        end="###",
        stops=("</s>", "###"),
    ),
    _lf("atom", "{bos}Human: {user}\n{eos}{bos}Assistant:", reply="{reply}\n"),
    _lf("baichuan", "{token:<reserved_102>}{user}{token:<reserved_103>}", efficient_eos=True),
    _lf("baichuan2", "{token:<reserved_106>}{user}{token:<reserved_107>}", efficient_eos=True),
    _lf("belle", "Human: {user}\n\nBelle: ", head="{bos}", after="\n\n", stops=("\n\nHuman:",)),
    _lf("bluelm", "{token:[|Human|]:}{user}{token:[|AI|]:}"),
    _lf("breeze", "[INST] {user} [/INST] ", head="{bos}", efficient_eos=True),
    _lf(
        "chatglm2",
        "[Round {round}]\n\n问：{user}\n\n答：",
        head="{token:[gMASK]}{token:sop}",
        efficient_eos=True,
    ),
    _lf(
        "chatglm3",
        "{token:<|user|>}\n{user}{token:<|assistant|>}",
        head="{token:[gMASK]}{token:sop}",
        system="{token:<|system|>}\n{system}",
        reply="\n{reply}",
        stops=("<|user|>", "<|observation|>"),
        efficient_eos=True,
    ),
    _chatml("chatml", more=("<|im_start|>",)),
    _chatml(
        "chatml_de",
        system="Du bist ein freundlicher und hilfsbereiter KI-Assistent.",
        more=("<|im_start|>",),
    ),
    _lf(
        "cohere",
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{user}<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        head="{bos}",
        system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{system}<|END_OF_TURN_TOKEN|>",
    ),
    _lf("cpm", "<用户>{user}<AI>", head="{bos}"),
    _chatml("cpm3", head="{bos}"),
    _chatml("cpm4", head="{bos}"),
    _lf("deepseek", "User: {user}\n\nAssistant:", head="{bos}", system="{system}\n\n", stops=("\n\nUser:",)),
    _lf("deepseek3", "<｜User｜>{user}<｜Assistant｜>", head="{bos}"),
    _lf("deepseekr1", "<｜User｜>{user}<｜Assistant｜>", head="{bos}", think=_THINK),
    _lf(
        "deepseekcoder",
        "### Instruction:\n{user}\n### Response:",
        head="{bos}",
        default_system=_DEEPSEEK_CODER,
        reply="\n{reply}",
        end="\n<|EOT|>",
        after="\n",
        stops=("<|EOT|>",),
    ),
    _lf("default", "Human: {user}{eos}\nAssistant:", system="System: {system}{eos}\n", after="\n"),
    _lf("empty", "{user}", end=""),
    _lf("exaone", "[|user|]{user}\n[|assistant|]", system="[|system|]{system}[|endofturn|]\n", after="\n"),
    _lf("falcon", "User: {user}\nFalcon:", reply="{reply}\n", efficient_eos=True, stops=("\nUser:",)),
    _chatml("falcon_h1", head="{bos}", more=("<|end_of_text|>",)),
    _lf("fewshot", "{user}", reply="{reply}\n\n", efficient_eos=True),
    _gemma("gemma"),
    _gemma("gemma2"),
    _gemma("gemma3"),
    _glm4("glm4"),
    _glm4("glm4_moe", think=_THINK),
    _glm4("glmz1", think=_THINK),
    _lf(
        "granite3",
        "<|start_of_role|>user<|end_of_role|>{user}<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>",
        system="<|start_of_role|>system<|end_of_role|>{system}<|end_of_text|>\n",
        end="<|end_of_text|>",
        after="\n",
        stops=("<|end_of_text|>",),
    ),
    _lf(
        "hunyuan",
        "{user}<|extra_0|>",
        head="<|startoftext|>",
        system="{system}<|extra_4|>",
        end="<|eos|>",
        stops=("<|eos|>",),
    ),
    _lf("index", "reserved_0{user}reserved_1", system="<unk>{system}", efficient_eos=True),
    _lf(
        "intern",
        "<|User|>:{user}\n<|Bot|>:",
        head="{bos}",
        system="<|System|>:{system}\n",
        default_system=_INTERN,
        end="<eoa>",
        after="\n",
        stops=("<eoa>",),
    ),
    _chatml("intern2", head="{bos}", system=_INTERN),
    _llama2("llama2"),
    _llama2("llama2_zh", "You are a helpful assistant. 你是一个乐于助人的助手。"),
    _llama3("llama3"),
    _lf(
        "llama4",
        "<|header_start|>user<|header_end|>\n\n{user}<|eot|><|header_start|>assistant<|header_end|>\n\n",
        head="{bos}",
        system="<|header_start|>system<|header_end|>\n\n{system}<|eot|>",
        end="<|eot|>",
        stops=("<|eot|>", "<|eom|>"),
    ),
    _lf("ministral", "[INST]{system}{user}[/INST]", head="{bos}", system="{system}\n\n"),
    _lf("mistral", "[INST] {system}{user}[/INST]", head="{bos}", system="{system}\n\n", reply=" {reply}"),
    _lf(
        "mistral_small", "[INST]{user}[/INST]", head="{bos}", system="[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT]"
    ),
    _lf("olmo", "<|user|>\n{user}<|assistant|>\n", head="{eos}"),
    _lf("openchat", "GPT4 Correct User: {user}{eos}GPT4 Correct Assistant:", head="{bos}"),
    _chatml("opencoder", system="You are OpenCoder, created by OpenCoder Team."),
    _lf("orion", "Human: {user}\n\nAssistant: {eos}", head="{bos}"),
    _lf(
        "phi",
        "<|user|>\n{user}<|end|>\n<|assistant|>\n",
        system="<|system|>\n{system}<|end|>\n",
        end="<|end|>",
        after="\n",
        stops=("<|end|>",),
    ),
    _lf(
        "phi4",
        "<|im_start|>user<|im_sep|>{user}<|im_end|><|im_start|>assistant<|im_sep|>",
        system="<|im_start|>system<|im_sep|>{system}<|im_end|>",
        end="<|im_end|>",
        stops=("<|im_end|>",),
    ),
    _chatml("qwen", system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    _chatml("qwen3", think=_THINK),
    _chatml("qwen3_nothink"),
    _chatml("smollm"),
    _chatml("smollm2", system="You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    _lf(
        "solar",
        "### User:\n{user}\n\n### Assistant:\n",
        system="### System:\n{system}\n\n",
        efficient_eos=True,
        stops=("### User:",),
    ),
    _lf(
        "starchat",
        "<|user|>\n{user}<|end|>\n<|assistant|>",
        system="<|system|>\n{system}<|end|>\n",
        end="<|end|>",
        after="\n",
        stops=("<|end|>",),
    ),
    _lf("telechat", "<_user>{user}<_bot>", system="<_system>{system}<_end>"),
    _lf("vicuna", "USER: {user} ASSISTANT:", default_system=_VICUNA),
    _lf("xuanyuan", "Human: {user} Assistant:", default_system=_XUANYUAN),
    _lf("xverse", "Human: {user}\n\nAssistant: ", stops=("\n\nHuman:",)),
    _chatml("yi"),
    _lf("yuan", "{user}{token:<sep>}", end="<eod>", after="\n", stops=("<eod>",)),
    _lf(
        "zephyr",
        "<|user|>\n{user}{eos}<|assistant|>\n",
        system="<|system|>\n{system}{eos}",
        default_system="You are Zephyr, a helpful assistant.",
    ),
    _lf("ziya", "<human>:{user}\n<bot>:", end="\n", stops=("<human>:",)),
)
