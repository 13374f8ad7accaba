"""An OpenAI-speaking address: what is asked there, with which key, and what its refusals mean to the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tuoling import environment
from tuoling.errors import EndpointError, UsageError
from tuoling.language import tr

KEY_VARIABLE = "TUOLING_API_KEY"
OPENAI_HOST = "api.openai.com"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_ROUTES = ("/chat/completions", "/completions", "/models")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model answers, and how hard it may be asked.

    url:          https://host/v1; the whole address of `chat/completions` and a bare host are understood too.
    model:        the model's name there.
    key_variable: environment variable that holds the key; None: TUOLING_API_KEY, at OpenAI's own host also
                  OPENAI_API_KEY (a key is never sent to a host it was not set for). A local host needs none.
    requests_per_minute, tokens_per_minute: never exceeded in any 60 seconds; None: no limit of ours.
    concurrency:  requests at once. timeout_s: without a byte from the server. max_retries: after the first try.
    """

    url: str
    model: str
    key_variable: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int = 4
    timeout_s: float = 120.0
    connect_timeout_s: float = 10.0
    max_retries: int = 5
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields sent along with every request, such as {"enable_thinking": false}."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                tr(f"not an address: {self.url}", f"不是合法的地址：{self.url}"),
                remedy="http://127.0.0.1:8000/v1, https://api.openai.com/v1",
            )
        if parts.username or parts.password:
            raise UsageError(
                tr("the address holds a password", "地址里含有密码"),
                remedy=tr(
                    f"put the key into the environment variable {self.key_variable or KEY_VARIABLE}",
                    f"请把密钥放进环境变量 {self.key_variable or KEY_VARIABLE}",
                ),
            )
        for name, lowest in (("concurrency", 1), ("max_retries", 0), ("timeout_s", 0.001)):
            if getattr(self, name) < lowest:
                raise UsageError(
                    tr(
                        f"{name}={getattr(self, name)} is below {lowest}",
                        f"{name}={getattr(self, name)} 小于 {lowest}",
                    )
                )
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(
                    tr(f"{name}={getattr(self, name)} is below 1", f"{name}={getattr(self, name)} 小于 1")
                )

    @property
    def base_url(self) -> str:
        """Scheme, host and path without a route: what is shown and saved; nothing of a query string."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/")
        for route in _ROUTES:
            path = path.removesuffix(route)
        return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"

    @property
    def query(self) -> dict[str, str]:
        """The address's own parameters, sent with every request (some hosts ask for `api-version`)."""
        return dict(parse_qsl(urlsplit(self.url).query))

    @property
    def is_local(self) -> bool:
        """On this machine: no key needed, no proxy used."""
        return urlsplit(self.url).hostname in LOCAL_HOSTS

    def key(self) -> str | None:
        """The key from the environment; None where a local host gets none. Raises UsageError where one is missing."""
        names = [self.key_variable] if self.key_variable else [KEY_VARIABLE]
        if not self.key_variable and urlsplit(self.url).hostname == OPENAI_HOST:
            names.append("OPENAI_API_KEY")
        for name in names:
            if found := environment.secret(name):
                return found.strip()
        if self.is_local and not self.key_variable:
            return None
        raise UsageError(
            tr(
                f"no key for {self.base_url}: {' and '.join(names)} not set",
                f"没有 {self.base_url} 的密钥：未设置环境变量 {'、'.join(names)}",
            ),
            remedy=tr(
                f"export {names[0]}=…   (a key is read from the environment only)",
                f"export {names[0]}=…   （密钥只从环境变量读取）",
            ),
        )

    def refusal(self, status: int, body: str) -> EndpointError:
        """What a status that is no success means, with the server's own words."""
        said, code = _said(body)
        problem = tr(f"the endpoint answered {status}", f"接口返回 {status}") + (f": {said}" if said else "")
        quota = status == 429 and "quota" in code
        remedy = None
        if status in (401, 403):
            remedy = tr(
                f"check the key in {self.key_variable or KEY_VARIABLE}",
                f"请检查环境变量 {self.key_variable or KEY_VARIABLE} 中的密钥",
            )
        elif status == 404:
            remedy = tr(
                f"check the address and the model's name ({self.model})",
                f"请检查地址和模型名（{self.model}）",
            )
        elif quota or status == 402:
            remedy = tr("the account has nothing left: top it up", "账户额度已用完，请充值")
        elif status == 429:
            remedy = tr("ask more slowly: --requests-per-minute N", "请降低频率：--requests-per-minute N")
        lasting = quota or status in (401, 402, 403, 404)
        return EndpointError(problem, where=self.base_url, remedy=remedy, status=status, lasting=lasting)


def _said(body: str) -> tuple[str, str]:
    """Message and code of an error body in any of the shapes servers use; a page of HTML says nothing."""
    try:
        value = json.loads(body)
    except ValueError:
        return ("", "") if "<" in body[:200] else (body.strip()[:300], "")
    error = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return str(error)[:300], ""
    said = error.get("message") or error.get("detail") or error.get("msg") or ""
    code = f"{error.get('code') or ''} {error.get('type') or ''}"
    return str(said)[:300], code.lower()
