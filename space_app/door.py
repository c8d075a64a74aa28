"""The door of the server: how large a request may be, how much is kept in all, and who is still inside.

It stands before Gradio (ASGI), so that what is refused here is never read: Gradio reads a body whole, and remembers it.
"""

import asyncio

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uploads import FULL, MAX_KEPT, MAX_MEGABYTES, MEGABYTE, bytes_kept
from work import CLOSING, RESTARTS

MAX_BODY = MEGABYTE  # bytes of a request: a chat of 50 turns takes half of it
MAX_UPLOAD = int(MAX_MEGABYTES * MEGABYTE) + MAX_BODY  # with what parts the files of a form
NOT_ANSWERS = ("/heartbeat/", "/upload_progress", "/startup-events")  # which stay open as long as a page does

inside: set[int] = set()  # answers that are not yet complete


class Door:
    """ASGI middleware. Its refusals are {"detail": sentence} with the status of HTTP that fits."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = await _refusal(scope)
        if refusal is not None:
            return await JSONResponse({"detail": refusal.detail}, refusal.status_code)(scope, receive, send)
        if any(name in scope["path"] for name in NOT_ANSWERS):
            return await self.app(scope, receive, send)
        try:
            inside.add(id(scope))
            await self.app(scope, _no_more_than(_limit(scope), receive), send)
        finally:
            inside.discard(id(scope))


def _limit(scope: Scope) -> int:
    return MAX_UPLOAD if _is_upload(scope) else MAX_BODY


def _is_upload(scope: Scope) -> bool:
    return scope["path"].rstrip("/").endswith("/upload")


async def _refusal(scope: Scope) -> HTTPException | None:
    """Why a request is not let in, as far as its head tells."""
    if scope["method"] != "POST":
        return None
    if CLOSING.is_set():
        return HTTPException(503, RESTARTS)
    length = dict(scope["headers"]).get(b"content-length", b"0")
    size = int(length) if length.isdigit() else 0
    if size > _limit(scope):
        return _too_large(_limit(scope))
    if _is_upload(scope) and await asyncio.to_thread(bytes_kept) + size > MAX_KEPT:
        return HTTPException(507, FULL)
    return None


def _too_large(limit: int) -> HTTPException:
    return HTTPException(
        413, f"The request is too large: at most {limit / MEGABYTE:g} MB are taken. Send less at once."
    )


def _no_more_than(limit: int, receive: Receive) -> Receive:
    """`receive` that counts, for a body whose length is not said."""
    taken = 0

    async def counted() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limit:
            raise _too_large(limit)
        return message

    return counted
