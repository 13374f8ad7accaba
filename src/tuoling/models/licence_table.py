"""What licences allow, and which known models, data sets and generators come under which. The only such table.

Each row names where its terms stand. It is a summary for people who then read the licence; where terms are not known
here, they are unknown, which is never read as allowed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Permission = Literal["yes", "conditions", "diff", "no", "unknown"]
"""conditions: yes, if they are kept. diff: not the weights themselves, only what changes others' copies into them."""

KINDS = ("model", "adapter", "data", "generator")
Kind = Literal["model", "adapter", "data", "generator"]


@dataclass(frozen=True, slots=True)
class Licence:
    """One licence, or a provider's terms for the outputs of its models.

    id:         SPDX's or the hub's name, small letters.
    commercial: use in a business. publish: giving away weights, or rows, that came from it.
    outputs:    training another model on what such a model answered.
    en, zh:     what has to be kept, for people.
    """

    id: str
    commercial: Permission
    publish: Permission
    source: str
    en: str = ""
    zh: str = ""
    outputs: Permission = "yes"
    aliases: tuple[str, ...] = ()


_CREDIT = ("keep its licence text and name its authors", "保留许可文本并注明作者")
_CC = "https://creativecommons.org/licenses/"

LICENCES: tuple[Licence, ...] = (
    Licence("own", "yes", "yes", "", "your own: you said so", "你自己的：由你声明", aliases=("mine", "private")),
    Licence("cc0-1.0", "yes", "yes", "https://creativecommons.org/publicdomain/zero/1.0/", aliases=("cc0",)),
    Licence("unlicense", "yes", "yes", "https://unlicense.org"),
    Licence(
        "apache-2.0", "yes", "conditions", "https://www.apache.org/licenses/LICENSE-2.0",
        "pass on its text and NOTICE, say what was changed", "附上许可文本与 NOTICE，并说明改动", aliases=("apache",),
    ),
    Licence("mit", "yes", "conditions", "https://opensource.org/license/mit", *_CREDIT),
    Licence("bsd-3-clause", "yes", "conditions", "https://opensource.org/license/bsd-3-clause", *_CREDIT, aliases=("bsd",)),
    Licence("cc-by-4.0", "yes", "conditions", _CC + "by/4.0/", *_CREDIT, aliases=("cc-by-3.0", "cc-by")),
    Licence(
        "cc-by-sa-4.0", "conditions", "conditions", _CC + "by-sa/4.0/",
        "name its authors; what is adapted from it is shared under the same licence",
        "注明作者；改编作品须以相同许可分享", aliases=("cc-by-sa-3.0", "cc-by-sa"),
    ),
    Licence(
        "cc-by-nc-4.0", "no", "conditions", _CC + "by-nc/4.0/", "no commercial use; name its authors",
        "不得商用；注明作者", "no", aliases=("cc-by-nc-3.0", "cc-by-nc", "cc-by-nc-2.0"),
    ),
    Licence(
        "cc-by-nc-sa-4.0", "no", "conditions", _CC + "by-nc-sa/4.0/",
        "no commercial use; name its authors; share under the same licence",
        "不得商用；注明作者；以相同许可分享", "no", aliases=("cc-by-nc-sa-3.0", "cc-by-nc-sa"),
    ),
    Licence(
        "cc-by-nc-nd-4.0", "no", "no", _CC + "by-nc-nd/4.0/", "no commercial use, and nothing adapted from it is shared",
        "不得商用，也不得分享改编作品", "no", aliases=("cc-by-nc-nd-3.0", "cc-by-nc-nd"),
    ),
    Licence(
        "odc-by", "conditions", "conditions", "https://opendatacommons.org/licenses/by/1-0/",
        "name the database; it covers the collection, rights in the single texts stay with others",
        "注明数据库来源；它只涉及汇编，单条文本的权利另属他人", aliases=("odc-by-1.0",),
    ),
    Licence(
        "odbl-1.0", "conditions", "conditions", "https://opendatacommons.org/licenses/odbl/1-0/",
        "name the database; a database derived from it is shared under the same licence",
        "注明数据库来源；衍生数据库须以相同许可分享", aliases=("odbl",),
    ),
    Licence(
        "gpl-3.0", "conditions", "conditions", "https://www.gnu.org/licenses/gpl-3.0",
        "what is conveyed stays under it, with its sources", "分发时须保持该许可并提供来源", aliases=("gpl",),
    ),
    Licence(
        "agpl-3.0", "conditions", "conditions", "https://www.gnu.org/licenses/agpl-3.0",
        "what is conveyed, or served over a network, stays under it with its sources",
        "分发或通过网络提供服务时须保持该许可并提供来源",
    ),
    Licence(
        "research-only", "no", "conditions", "", "for research only, and so is whatever is made from it", "仅供研究，由其得到的一切也是如此", "no",
        aliases=("non-commercial", "noncommercial", "research"),
    ),
    Licence(
        "bigscience-bloom-rail-1.0", "conditions", "conditions", "https://huggingface.co/spaces/bigscience/license",
        "the forbidden uses of its attachment A bind you, and you bind your users to them; pass on its text, "
        "say what was changed",
        "附件 A 列出的禁止用途对你有约束力，你也须约束你的用户；附上许可文本并说明改动", "conditions",
        aliases=("bloom-rail", "bigscience-openrail-m", "openrail", "openrail++", "creativeml-openrail-m"),
    ),
    Licence(
        "bigcode-openrail-m", "conditions", "conditions",
        "https://huggingface.co/spaces/bigcode/bigcode-model-license-agreement",
        "its forbidden uses bind you and your users; pass on its text", "其禁止用途约束你和你的用户；附上许可文本",
        "conditions",
    ),
    Licence(
        "llama-1", "no", "diff", "https://github.com/facebookresearch/llama/blob/llama_v1/MODEL_CARD.md",
        "research only, each user applied for it; weights may not be given on, so derived ones are published as a diff "
        "(tuoling diff) or an adapter",
        "仅限研究，使用者须各自申请；不得转发权重，因此衍生模型只以差分（tuoling diff）或适配器发布", "no",
        aliases=("llama1", "llama"),
    ),
    Licence(
        "llama2", "conditions", "conditions", "https://ai.meta.com/llama/license/",
        "keep its notice and acceptable use policy; a licence of its own above 700 million monthly users; its outputs "
        "may not improve other models than Llama",
        "保留声明和使用政策；月活超过 7 亿须另行取得许可；其输出不得用于改进 Llama 以外的模型", "conditions",
        aliases=("llama-2",),
    ),
    Licence(
        "llama3", "conditions", "conditions", "https://www.llama.com/llama3/license/",
        "say Built with Meta Llama 3, the name of a derived model begins with Llama 3; keep notice and acceptable use "
        "policy; a licence of its own above 700 million monthly users; its outputs may not improve other models",
        "注明 Built with Meta Llama 3，衍生模型的名称以 Llama 3 开头；保留声明和使用政策；月活超过 7 亿须另行取得许可；"
        "其输出不得用于改进其他模型", "conditions", aliases=("llama-3",),
    ),
    Licence(
        "llama3.1", "conditions", "conditions", "https://www.llama.com/llama3_1/license/",
        "say Built with Llama, the name of a derived model, also of one trained on its outputs, begins with Llama; keep "
        "notice and acceptable use policy; a licence of its own above 700 million monthly users",
        "注明 Built with Llama，衍生模型（包括用其输出训练的）名称以 Llama 开头；保留声明和使用政策；"
        "月活超过 7 亿须另行取得许可", "conditions",
        aliases=("llama-3.1", "llama3.2", "llama-3.2", "llama3.3", "llama-3.3", "llama4", "llama-4"),
    ),
    Licence(
        "tongyi-qianwen", "conditions", "conditions",
        "https://github.com/QwenLM/Qwen/blob/main/Tongyi%20Qianwen%20LICENSE%20AGREEMENT",
        "a licence of its own above 100 million monthly users; pass on its text; its outputs may not improve other "
        "models",
        "月活超过 1 亿须另行取得许可；附上许可文本；其输出不得用于改进其他模型", "conditions",
    ),
    Licence(
        "qwen", "conditions", "conditions", "https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/LICENSE",
        "a licence of its own above 100 million monthly users; a model made from it, or from its outputs, says Built "
        "with Qwen",
        "月活超过 1 亿须另行取得许可；由它或其输出得到的模型须注明 Built with Qwen", "conditions",
    ),
    Licence(
        "qwen-research", "no", "conditions", "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE",
        "research and evaluation only; a model made from it says Built with Qwen",
        "仅限研究与评测；由它得到的模型须注明 Built with Qwen", "no", aliases=("tongyi-qianwen-research",),
    ),
    Licence(
        "gemma", "conditions", "conditions", "https://ai.google.dev/gemma/terms",
        "its prohibited uses bind you and your users; a model trained on its outputs counts as derived",
        "其禁止用途约束你和你的用户；用其输出训练的模型也算衍生模型", "conditions",
    ),
    Licence(
        "baichuan", "conditions", "conditions", "https://huggingface.co/baichuan-inc/Baichuan2-7B-Base",
        "commercial use after an application to the publisher, with bounds on users", "商用须向发布者申请，并有用户规模限制",
        "unknown", aliases=("baichuan2",),
    ),
    Licence(
        "chatglm", "conditions", "conditions", "https://github.com/THUDM/ChatGLM2-6B/blob/main/MODEL_LICENSE",
        "commercial use after registration with the publisher", "商用须向发布者登记", "unknown",
        aliases=("glm-4", "glm4"),
    ),
    Licence(
        "deepseek", "conditions", "conditions",
        "https://github.com/deepseek-ai/DeepSeek-LLM/blob/main/LICENSE-MODEL",
        "its forbidden uses bind you and your users; pass on its text", "其禁止用途约束你和你的用户；附上许可文本",
        "conditions", aliases=("deepseek-license",),
    ),
    Licence(
        "internlm", "conditions", "conditions", "https://github.com/InternLM/InternLM#license",
        "commercial use after an application to the publisher", "商用须向发布者申请", "unknown",
    ),
    Licence(
        "falcon-180b", "conditions", "conditions", "https://huggingface.co/tiiuae/falcon-180B",
        "not to be offered as a hosted service; its acceptable use policy binds you", "不得作为托管服务提供；须遵守使用政策",
        "conditions", aliases=("falcon-llm-license",),
    ),
    Licence(
        "opt", "no", "unknown", "https://github.com/facebookresearch/metaseq/blob/main/projects/OPT/MODEL_LICENSE.md",
        "research only", "仅限研究", "no", aliases=("opt-license",),
    ),
    Licence(
        "mistral-research", "no", "conditions", "https://mistral.ai/licenses/MRL-0.1.md",
        "research only", "仅限研究", "no", aliases=("mrl", "mnpl"),
    ),
    Licence(
        "openai-outputs", "conditions", "conditions", "https://openai.com/policies/terms-of-use",
        "written by OpenAI's models: whoever got them from the service may not train competing models on them",
        "由 OpenAI 的模型生成：从其服务取得者不得用来训练与之竞争的模型", "conditions", aliases=("openai",),
    ),
    Licence(
        "provider-outputs", "unknown", "unknown", "",
        "written by another provider's model: its terms of service decide, read them",
        "由其他服务商的模型生成：以其服务条款为准，请先阅读", "unknown",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Known:
    """Models or data known by name. pattern: searched in a name with small letters and `-` for `_`."""

    kind: Kind
    pattern: str
    licences: tuple[str, ...]
    source: str

    def fits(self, kind: str, name: str) -> bool:
        return (self.kind == "data") == (kind == "data") and re.search(self.pattern, name) is not None


_HF = "https://huggingface.co/"
_GITHUB = "https://github.com/"
_RAIL = "bigscience-bloom-rail-1.0"

KNOWN: tuple[Known, ...] = (
    # models; the first that fits counts
    Known("model", r"belle-llama", ("llama-1", "research-only"), _GITHUB + "LianjiaTech/BELLE/tree/main/models"),
    Known("model", r"\bbelle-(7b|bloom)", (_RAIL, "research-only"), _GITHUB + "LianjiaTech/BELLE/tree/main/models"),
    Known("model", r"(^|/)bloomz?(-|$)", (_RAIL,), _HF + "bigscience/bloom"),
    Known("model", r"open-?llama", ("apache-2.0",), _GITHUB + "openlm-research/open_llama"),
    Known("model", r"tiny-?llama|\bsmollm|\bolmo-|minimind|granite-3", ("apache-2.0",), _HF + "TinyLlama"),
    Known("model", r"stories\d+(k|m)|tinyllamas", ("mit",), _HF + "karpathy/tinyllamas"),
    Known("model", r"alpaca-7b", ("llama-1", "cc-by-nc-4.0"), _GITHUB + "tatsu-lab/stanford_alpaca"),
    Known(
        "model", r"decapoda-research/llama|huggyllama/llama|(^|/)llama-(7|13|30|33|65)b(-hf)?$|vicuna-(7|13|33)b(-v1\.[0-3]|-delta.*)?$",
        ("llama-1",), _GITHUB + "facebookresearch/llama/blob/llama_v1/MODEL_CARD.md",
    ),
    Known("model", r"llama-?2-|code-?llama|vicuna-(7|13)b-v1\.5", ("llama2",), "https://ai.meta.com/llama/license/"),
    Known("model", r"llama-?(3\.[1-3]|4)", ("llama3.1",), "https://www.llama.com/llama3_1/license/"),
    Known("model", r"llama-?3", ("llama3",), "https://www.llama.com/llama3/license/"),
    Known("model", r"qwen2\.5-(coder-|math-)?3b", ("qwen-research",), _HF + "Qwen/Qwen2.5-3B"),
    Known("model", r"qwen2\.5-(math-)?72b", ("qwen",), _HF + "Qwen/Qwen2.5-72B"),
    Known("model", r"qwen2-(math-)?72b", ("tongyi-qianwen",), _HF + "Qwen/Qwen2-72B"),
    Known("model", r"qwen(2(\.5)?|3)(-|$)", ("apache-2.0",), _HF + "Qwen"),
    Known("model", r"qwen1\.5-(0\.5|1\.8|4)b|qwen-1-?[.-]?8b", ("qwen-research",), _HF + "Qwen/Qwen1.5-4B"),
    Known("model", r"qwen(1\.5)?-\d", ("tongyi-qianwen",), _HF + "Qwen/Qwen-7B"),
    Known("model", r"mistral-7b|mixtral-8x", ("apache-2.0",), _HF + "mistralai"),
    Known("model", r"codestral|mistral-(small|large)-2[34]", ("mistral-research",), "https://mistral.ai/licenses/MRL-0.1.md"),
    Known("model", r"chatglm[23]?-6b|glm-4-9b", ("chatglm",), _GITHUB + "THUDM"),
    Known("model", r"baichuan2?-(7|13)b", ("baichuan",), _HF + "baichuan-inc"),
    Known("model", r"internlm3", ("apache-2.0",), _HF + "internlm/internlm3-8b-instruct"),
    Known("model", r"internlm", ("internlm",), _GITHUB + "InternLM/InternLM"),
    Known("model", r"falcon-180b", ("falcon-180b",), _HF + "tiiuae/falcon-180B"),
    Known("model", r"falcon-(rw-1b|7b|40b)|\bpythia-|gpt-neox-20b|\bgpt-j-6b", ("apache-2.0",), _HF + "EleutherAI"),
    Known("model", r"(^|/)gpt2(-|$)|gpt-neo-|\bphi-[1-4]|\bxglm-|deepseek-r1$", ("mit",), _HF + "EleutherAI/gpt-neo-1.3B"),
    Known("model", r"(^|/)opt-\d", ("opt",), _HF + "facebook/opt-1.3b"),
    Known("model", r"deepseek-(llm|coder|moe|v2)", ("deepseek",), _GITHUB + "deepseek-ai/DeepSeek-LLM"),
    Known("model", r"\bgemma-", ("gemma",), "https://ai.google.dev/gemma/terms"),
    Known("model", r"\bstarcoder", ("bigcode-openrail-m",), _HF + "bigcode"),
    Known("model", r"stablelm-tuned-alpha", ("cc-by-nc-sa-4.0",), _GITHUB + "Stability-AI/StableLM"),
    Known("model", r"stablelm-base-alpha", ("cc-by-sa-4.0",), _GITHUB + "Stability-AI/StableLM"),
    Known("model", r"\byi-\d", ("apache-2.0",), _HF + "01-ai"),
    # models that answered for somebody else
    Known("model", r"\bgpt-[345]|text-davinci|chatgpt|\bo[134](-|$)", ("openai-outputs",), "https://openai.com/policies/terms-of-use"),
    Known("model", r"\b(claude|gemini|ernie|doubao|moonshot|kimi|hunyuan|spark|glm-4-plus|qwen-(max|plus|turbo|long))", ("provider-outputs",), ""),
    # data
    Known(
        "data", r"bellegroup|\bbelle[-./]|train-(0\.5|1|2|3\.5)m-cn|school-math-0\.25m|multiturn-chat-0\.8m|generated-chat-0\.4m|belle$",
        ("odc-by", "research-only", "openai-outputs"), _GITHUB + "LianjiaTech/BELLE/tree/main/data",
    ),
    Known("data", r"zh-seed-tasks", ("odc-by", "research-only"), _GITHUB + "LianjiaTech/BELLE/tree/main/data/1.5M"),
    Known("data", r"alpaca-cleaned", ("cc-by-4.0", "openai-outputs"), _HF + "datasets/yahma/alpaca-cleaned"),
    Known(
        "data", r"alpaca-data|tatsu-lab/alpaca|alpaca-gpt-?4|alpaca-zh|trans-chinese-alpaca|(^|/)alpaca(\.jsonl?)?$",
        ("cc-by-nc-4.0", "openai-outputs"), _GITHUB + "tatsu-lab/stanford_alpaca#data-release",
    ),
    Known("data", r"sharegpt", ("provider-outputs",), "https://openai.com/policies/terms-of-use"),
    Known("data", r"ultrachat", ("mit", "openai-outputs"), _HF + "datasets/HuggingFaceH4/ultrachat_200k"),
    Known("data", r"moss-00[23]-sft", ("cc-by-nc-4.0", "openai-outputs"), _GITHUB + "OpenMOSS/MOSS"),
    Known("data", r"guanaco-?dataset", ("gpl-3.0", "openai-outputs"), _HF + "datasets/JosephusCheung/GuanacoDataset"),
    Known("data", r"dolly-15k", ("cc-by-sa-4.0",), _HF + "datasets/databricks/databricks-dolly-15k"),
    Known("data", r"oasst[12]|\bcoig\b", ("apache-2.0",), _HF + "datasets/OpenAssistant/oasst1"),
    Known("data", r"\bc4\b|redpajama|\bdolma\b|fineweb", ("odc-by",), _HF + "datasets/allenai/c4"),
    Known("data", r"\bwiki(pedia|text)", ("cc-by-sa-4.0",), "https://dumps.wikimedia.org/legal.html"),
    Known("data", r"\bgsm8k\b", ("mit",), _GITHUB + "openai/grade-school-math"),
    Known("data", r"\bceval\b|\bc-eval\b", ("cc-by-nc-sa-4.0",), _HF + "datasets/ceval/ceval-exam"),
    Known("data", r"\bcmmlu\b", ("cc-by-nc-4.0",), _HF + "datasets/haonan-li/cmmlu"),
)  # fmt: skip

TEXTS: tuple[tuple[str, str], ...] = (
    ("bigscience rail license", "bigscience-bloom-rail-1.0"),
    ("bigcode openrail-m", "bigcode-openrail-m"),
    ("llama 3.1 community license", "llama3.1"),
    ("llama 3.2 community license", "llama3.1"),
    ("llama 3.3 community license", "llama3.1"),
    ("llama 4 community license", "llama3.1"),
    ("llama 3 community license", "llama3"),
    ("llama 2 community license", "llama2"),
    ("llama large language model family: noncommercial", "llama-1"),
    ("qwen research license", "qwen-research"),
    ("tongyi qianwen research license", "qwen-research"),
    ("tongyi qianwen license", "tongyi-qianwen"),
    ("qwen license agreement", "qwen"),
    ("gemma terms of use", "gemma"),
    ("deepseek license agreement", "deepseek"),
    ("attribution-noncommercial-noderivatives 4.0", "cc-by-nc-nd-4.0"),
    ("attribution-noncommercial-sharealike 4.0", "cc-by-nc-sa-4.0"),
    ("attribution-noncommercial 4.0", "cc-by-nc-4.0"),
    ("attribution-sharealike 4.0", "cc-by-sa-4.0"),
    ("attribution 4.0 international", "cc-by-4.0"),
    ("cc0 1.0 universal", "cc0-1.0"),
    ("odc attribution license", "odc-by"),
    ("open data commons attribution", "odc-by"),
    ("open database license", "odbl-1.0"),
    ("gnu affero general public license", "agpl-3.0"),
    ("gnu general public license", "gpl-3.0"),
    ("apache license", "apache-2.0"),
    ("redistribution and use in source and binary forms", "bsd-3-clause"),
    ("permission is hereby granted, free of charge", "mit"),
)
"""Words of a licence file, small letters and single spaces, → licence. The first that is found counts."""

HOSTS: tuple[tuple[str, str], ...] = (
    ("openai.com", "openai-outputs"),
    ("openai.azure.com", "openai-outputs"),
    ("anthropic.com", "provider-outputs"),
    ("googleapis.com", "provider-outputs"),
    ("aliyuncs.com", "provider-outputs"),
    ("volces.com", "provider-outputs"),
    ("moonshot.cn", "provider-outputs"),
    ("bigmodel.cn", "provider-outputs"),
    ("baidubce.com", "provider-outputs"),
)
"""End of an endpoint's host name → the terms its outputs come under."""

BY_ID = {name: licence for licence in LICENCES for name in (licence.id, *licence.aliases)}
