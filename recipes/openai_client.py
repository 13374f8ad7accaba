"""OpenAI's own client talks to `tuoling serve`, each call shown with its answer · 用 OpenAI 官方客户端调用 `tuoling serve`

pip install openai
tuoling serve runs/first                                                       # in one terminal · 在一个终端
python recipes/openai_client.py                                                # in another · 在另一个终端
python recipes/openai_client.py http://127.0.0.1:8000/v1 "34加1等于多少？"        # another address or question

The key of a server that asks for one is read from the environment variable TUOLING_API_KEY.
服务器要求密钥时，从环境变量 TUOLING_API_KEY 读取。
"""

from __future__ import annotations

import os
import sys
from typing import Any

from openai import APIStatusError, OpenAI

ADDRESS = "http://127.0.0.1:8000/v1"
QUESTION = "你好，请介绍一下你自己。"


def show_chat(client: OpenAI, asked: dict[str, Any]) -> str:
    answer = client.chat.completions.create(**asked)
    print("chat:", answer.choices[0].message.content)
    print("  finish_reason:", answer.choices[0].finish_reason, " usage:", answer.usage.to_dict())
    return answer.choices[0].message.content


def show_stream(client: OpenAI, asked: dict[str, Any]) -> None:
    print("stream: ", end="")
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            if choice.delta.content:
                print(choice.delta.content, end="|", flush=True)
        if chunk.usage:
            print("\n  usage:", chunk.usage.to_dict())


def show_several(client: OpenAI, asked: dict[str, Any]) -> None:
    """Two answers of one request, and the same two again with the same seed."""
    drawn = {**asked, "temperature": 1.5, "top_p": 1, "n": 2, "seed": 7}
    first, again = (client.chat.completions.create(**drawn) for _ in range(2))
    for choice in first.choices:
        print(f"n=2, seed=7, answer {choice.index}:", choice.message.content)
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, again)]
    print("  the same with the same seed:", texts[0] == texts[1])


def show_logprobs(client: OpenAI, asked: dict[str, Any]) -> None:
    answer = client.chat.completions.create(**{**asked, "max_tokens": 3}, logprobs=True, top_logprobs=2)
    for token in answer.choices[0].logprobs.content:
        best = ", ".join(f"{other.token!r} {other.logprob:.3f}" for other in token.top_logprobs)
        print(f"logprobs: {token.token!r} {token.logprob:.3f}   (best: {best})")


def show_stop(client: OpenAI, asked: dict[str, Any], whole: str) -> None:
    """The answer ends before a text of it that the request names."""
    stop = whole[len(whole) // 2 :][:2] or "。"
    choice = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    print(f"stop={stop!r}:", choice.message.content, " finish_reason:", choice.finish_reason)


def show_refusal(client: OpenAI, asked: dict[str, Any], **wrong: Any) -> None:
    """What a program sees of a request that cannot be done: OpenAI's error, with a status and a code."""
    try:
        client.chat.completions.create(**{**asked, **wrong})
    except APIStatusError as error:
        print(f"{wrong}: {type(error).__name__} {error.status_code}", error.body)
    else:
        sys.exit(f"{wrong} was not refused")


def main() -> None:
    address, question = [*sys.argv[1:3], *[ADDRESS, QUESTION][len(sys.argv) - 1 :]]
    client = OpenAI(base_url=address, api_key=os.environ.get("TUOLING_API_KEY", "none"))
    names = [model.id for model in client.models.list()]
    print("models:", *names)
    asked = {
        "model": names[0],
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 64,
    }
    whole = show_chat(client, asked)
    show_stream(client, asked)
    show_several(client, asked)
    show_logprobs(client, asked)
    show_stop(client, asked, whole)
    show_refusal(client, asked, model="nobody")
    show_refusal(client, asked, temperature=-1)


if __name__ == "__main__":
    main()
