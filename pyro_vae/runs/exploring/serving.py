"""The page on a port of this machine."""

import contextlib
import logging
import os
import socket
import webbrowser
from typing import Any

from pyro_vae.errors import RunError, reason_of
from pyro_vae.runs.exploring.aside import Aside
from pyro_vae.runs.exploring.explorer import Explorer

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "media-src 'self' blob:; worker-src 'self' blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
"""Whatever is on the page, it asks no other host. Gradio's own scripts need to be inline and to evaluate templates."""
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def serve(explorer: Explorer, host: str, port: int, browser: bool | None) -> None:
    """Serve until interrupted.

    Raises:
        RunError: if the port is busy, or there is no browser and there must be one.
    """
    with bound(host, port) as listening, contextlib.suppress(KeyboardInterrupt):
        address = f"http://{host}:{listening.getsockname()[1]}/"
        found = browser_of() if browser is not False else None
        if browser and found is None:
            raise RunError(f"--browser: no browser is found here: leave it out, and open {address} yourself")
        with contextlib.closing(Aside(explorer.run.path, explorer.run.trust, explorer.seed)) as aside:
            server = server_of(application(explorer, aside, host))
            print(f"{address}  (only on this machine; Ctrl-C ends it)", flush=True)
            if found is not None:
                found.open(address)
            elif browser is None:
                print("no browser is found here: open the address yourself, from afar by ssh -L", flush=True)
            server.run(sockets=[listening])


def bound(host: str, port: int) -> socket.socket:
    """A socket at a port.

    Raises:
        RunError: if it is taken.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name != "nt":
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise RunError(f"--port {port}: {reason_of(error)}; choose another, or 0 for any") from error
    return listening


def browser_of() -> Any:
    """The browser of this machine; None: there is none."""
    if os.name == "posix" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        import sys

        if sys.platform != "darwin":  # what is left is a browser of text, in the terminal that shows our lines
            return None
    try:
        return webbrowser.get()
    except webbrowser.Error:
        return None


def application(explorer: Explorer, aside: Aside, host: str) -> Any:
    """The page as an ASGI application that answers to this host alone and asks no other."""
    os.environ.update(QUIET)  # before it is imported: it asks nobody whether it is new
    import gradio  # pyright: ignore[reportMissingImports]
    from fastapi import FastAPI  # pyright: ignore[reportMissingImports]
    from starlette.middleware.trustedhost import TrustedHostMiddleware  # pyright: ignore[reportMissingImports]

    from pyro_vae.runs.exploring.page import TEMPLATES, Page

    gr: Any = gradio
    blocks = Page(explorer, aside).build()
    blocks.queue(api_open=False)
    app = FastAPI(openapi_url=None)
    narrow = TEMPLATES.joinpath("narrow.css").read_text(
        "utf-8"
    )  # of what is around the page, which css= does not reach
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )  # none of Google
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=host,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        max_file_size="20mb",
        theme=theme,
        css=TEMPLATES.joinpath("explore.css").read_text("utf-8"),
        head=f"<style>{narrow}</style>",
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost"])
    return with_policy(app)


def with_policy(app: Any) -> Any:
    """An ASGI application whose answers have the policy above."""

    async def policed(scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, sent)

    return policed


def server_of(app: Any) -> Any:
    """A server that says nothing unless something is wrong."""
    import uvicorn  # pyright: ignore[reportMissingImports]

    logging.getLogger("httpx").setLevel(logging.WARNING)
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
