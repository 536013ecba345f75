"""The service's routes, and what they say when something is wrong: always JSON, never a path or a traceback."""

import re
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from clipdist import __version__
from clipdist.publish.serve import schema
from clipdist.publish.serve.limits import Guard, Refused, error_response
from clipdist.publish.serve.service import Service

PAGE = Path(__file__).with_name("page")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
MOST_TOP = 100
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})

Top = Annotated[int, Field(ge=1, le=MOST_TOP)]
Row = Annotated[int, InPath(ge=0, lt=2**63)]
Side = Annotated[int, Query(ge=16, le=512)]


class TextQuestion(BaseModel):
    text: str
    top: Top = 10


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the schema: statuses with which a route may refuse."""
    return {status: {"model": schema.ErrorBody} for status in statuses}


def multipart(required: list[str], **properties: dict[str, Any]) -> dict[str, Any]:
    """For the schema: the body of a route that reads its form itself, so that no file of it reaches a disk."""
    described = {"type": "object", "properties": properties, "required": required}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": described}}}}


FILE: dict[str, Any] = {"type": "string", "format": "binary"}
TOP: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": MOST_TOP}
OF_FORMS = answers(400, 408, 413, 415, 421, 422, 503, 504)


def make_app(service: Service, *, hosts: frozenset[str] | None = LOOPBACK_NAMES) -> Guard:
    """`hosts`: names under which the service answers, None for all. A page elsewhere that points a name of its own at
    this machine must not read answers in its visitor's browser."""

    app = FastAPI(title="clipdist", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _broken)
    _add_questions(app, service)
    _add_state(app, service)
    _add_page(app)
    return Guard(app, service.limits, service.metrics, service.admission, hosts)


def _add_questions(app: FastAPI, service: Service) -> None:
    limits = service.limits

    @app.post(
        "/api/image",
        responses=OF_FORMS | answers(409),
        openapi_extra=multipart(["image"], image=FILE, classes={"type": "string"}, top=TOP),
    )
    async def image(request: Request) -> schema.ImageAnswer:
        """Classes, captions and neighbours of one image; `classes`, names between commas or line ends, takes the place
        of the service's own."""
        form = await read_form(request, files=1)
        given = form.text("classes")
        words = list(dict.fromkeys(word.strip() for word in re.split(r"[,\n]", given) if word.strip()))
        return await service.image(
            await form.file("image"), words if given.strip() else None, form.number("top", 5), form.ticket
        )

    @app.post(
        "/api/relevance",
        responses=OF_FORMS | answers(501) | {200: {"content": {"image/png": {}}}},
        response_class=Response,
        openapi_extra=multipart(
            ["image", "text"],
            image=FILE,
            text={"type": "string", "minLength": 1, "maxLength": limits.max_text_characters},
        ),
    )
    async def relevance(request: Request) -> Response:
        """A PNG of what in the image speaks for a text, or for a class of that name."""
        form = await read_form(request, files=1)
        png = await service.relevance(await form.file("image"), form.text("text"), form.ticket)
        return Response(png, media_type="image/png", headers={"Cache-Control": "no-store"})

    @app.post(
        "/api/batch",
        responses=OF_FORMS | {200: {"content": {"text/csv": {}}}},
        response_class=Response,
        openapi_extra=multipart(["images"], images={"type": "array", "items": FILE, "minItems": 1}),
    )
    async def batch(request: Request) -> Response:
        """A table of many images: their likeliest classes and best caption, or what is wrong with them."""
        form = await read_form(request, files=limits.max_batch_files)
        table = await service.table(await form.files("images"), form.ticket)
        return Response(table, media_type="text/csv; charset=utf-8", headers={"Cache-Control": "no-store"})

    @app.post("/api/text", responses=answers(400, 408, 409, 413, 421, 422, 503, 504))
    async def text(request: Request, question: Annotated[TextQuestion, Body()]) -> schema.TextAnswer:
        """The gallery's images that are nearest to a text."""
        return await service.text(question.text, question.top, request.headers.get("x-ticket"))

    @app.get(
        "/api/gallery/{row}/thumbnail",
        responses=answers(404, 409, 421, 422, 504) | {200: {"content": {"image/jpeg": {}}}},
        response_class=Response,
    )
    async def thumbnail(row: Row, side: Side = 160) -> Response:
        """A JPEG that fits into a square of `side` pixels."""
        made = await service.thumbnail(row, side)
        return Response(made, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/api/about", responses=answers(421))
    async def about() -> schema.About:
        """The model, what is asked of it, what it reached, and the limits of a request."""
        return service.about

    @app.get("/api/queue", responses=answers(421))
    async def queue() -> schema.Queue:
        return schema.Queue(waiting=service.admission.inside, limit=service.admission.limit)

    @app.get("/api/queue/{ticket}", responses=answers(404, 421, 422))
    async def place(ticket: str) -> schema.Place:
        """Where the request that was sent with the header `X-Ticket: {ticket}` stands."""
        return schema.Place(position=service.batcher.position(ticket))

    @app.get("/healthz", responses=answers(421, 503))
    async def health() -> schema.Health:
        failing = service.failing()
        if failing:
            raise Refused(503, failing)
        return schema.Health(status="ok")

    @app.get("/metrics", response_class=Response, responses=answers(421) | {200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    # Read once: no name from outside ever becomes a path.
    files = {path.name: path.read_bytes() for path in PAGE.iterdir() if path.suffix in MEDIA_TYPES}

    def served(name: str) -> Response:
        if name not in files:
            raise Refused(404, "no such page")
        media_type = MEDIA_TYPES[Path(name).suffix]
        return Response(files[name], media_type=media_type, headers={"Cache-Control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return served("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page(name: str) -> Response:
        return served(name)


class _Parser(MultiPartParser):
    spool_max_size = 2**62  # bodies are limited before; nothing that was sent is ever written to a disk


class Form:
    """A multipart form, with refusals that name the field."""

    def __init__(self, fields: Any, ticket: str | None) -> None:
        self._fields, self.ticket = fields, ticket or self._text(fields.get("ticket"))

    async def file(self, name: str) -> bytes:
        found = await self.files(name)
        if len(found) > 1:
            raise Refused(422, f"{name}: found {len(found)} files, expected one")
        return found[0][1]

    async def files(self, name: str) -> list[tuple[str, bytes]]:
        """(name of the file, bytes) of each; at least one."""
        found = [one for one in self._fields.getlist(name) if isinstance(one, UploadFile)]
        if not found:
            raise Refused(422, f"{name}: found no file, expected an image")
        held = []
        for one in found:
            held.append((one.filename or "", await one.read()))
            await one.close()  # what was sent is held once
        return held

    def text(self, name: str) -> str:
        """Empty when it was not sent."""
        return self._text(self._fields.get(name)) or ""

    def number(self, name: str, default: int) -> int:
        text = self.text(name).strip()
        if not text:
            return default
        if not re.fullmatch(r"[0-9]{1,4}", text, re.ASCII) or not 1 <= int(text) <= MOST_TOP:
            raise Refused(422, f"{name}: expected a whole number from 1 to {MOST_TOP}")
        return int(text)

    @staticmethod
    def _text(value: Any) -> str | None:
        return value if isinstance(value, str) else None


async def read_form(request: Request, files: int) -> Form:
    """The form, in memory. Raises `Refused` for another kind of body, a broken one, or more than `files` files."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refused(415, "expected a form of the type multipart/form-data")
    try:
        parser = _Parser(request.headers, request.stream(), max_files=files, max_fields=16)
        fields = await parser.parse()
    except UnicodeError:
        raise Refused(400, "the form's names cannot be read: expected them in UTF-8") from None
    except MultiPartException as error:
        limit = "exceeded" in error.message or "Maximum" in error.message
        raise Refused(413 if limit else 400, f"the form cannot be read: {error.message}") from None
    return Form(fields, request.headers.get("x-ticket"))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, str(error.detail), dict(error.headers or {}))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Names the place and what was expected, and repeats nothing of what was sent."""
    assert isinstance(error, RequestValidationError)
    found = [f"{'.'.join(str(part) for part in one['loc'][1:]) or 'body'}: {one['msg']}" for one in error.errors()[:3]]
    return error_response(422, "; ".join(found)[:500])


async def _gone(request: Request, error: Exception) -> JSONResponse:
    return error_response(400, "the request ended before it was whole")


async def _broken(request: Request, error: Exception) -> JSONResponse:
    return error_response(500, "something went wrong here; the service's own log says what")
