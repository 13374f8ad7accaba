"""`tuoling web`: a page in the browser to talk to models that are loaded."""

from __future__ import annotations

import secrets
import socket
from typing import Any

from tuoling import environment
from tuoling.errors import MissingPackage, UsageError
from tuoling.language import tr
from tuoling.serve.web_answer import WebModels


def web_app(models: WebModels, *, title: str, auth: tuple[str, str] | None = None, local: bool = True) -> Any:
    """The page as an ASGI application. local: it answers only to this machine's own names.

    Raises MissingPackage where gradio is not installed.
    """
    require_gradio()
    import gradio as gr
    from fastapi import FastAPI

    from tuoling.serve import web_look
    from tuoling.serve.web_guard import Guard
    from tuoling.serve.web_page import build_page

    page = build_page(models, title=title)
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        "/",
        theme=web_look.theme(),
        head=web_look.head(),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        show_error=True,
    )
    return Guard(app, auth=auth, local=local)


def require_gradio() -> None:
    """Raise MissingPackage where gradio is not installed; import it without its usage statistics."""
    environment.prepare_gradio()
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MissingPackage("gradio", extra="serve", purpose=tr("the web page", "网页界面")) from error


def choose_auth(
    user_and_password: str | None, *, local: bool, asked: bool
) -> tuple[tuple[str, str] | None, bool]:
    """User and password of the page, and whether they were made up just now.

    There are some where somebody set them or asked for them, and wherever other machines can reach the page (not
    `local`). Raises UsageError.
    """
    if user_and_password:
        user, colon, password = user_and_password.partition(":")
        if not (user and colon and password):
            raise UsageError(
                tr("user and password are not USER:PASSWORD", "用户名与密码不是“用户名:密码”的形式"),
                where="TUOLING_WEB_AUTH",
            )
        return (user, password), False
    if local and not asked:
        return None, False
    return ("tuoling", secrets.token_urlsafe(12)), True


def address(found: socket.socket) -> str:
    """What to type into a browser."""
    host, port = found.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def page_server(app: Any) -> Any:
    """A uvicorn server for the page. `run(sockets=[...])` serves until Ctrl-C, SIGTERM or `should_exit`."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
    )
