"""What a client is told when a request is refused: OpenAI's error shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

REQUEST = "invalid_request_error"


class ApiError(HTTPException):
    """A request that is not answered: HTTP status, one sentence, the parameter it is about, and a code that programs read."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = REQUEST,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.kind, self.param, self.code = kind, param, code

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {"error": {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}}


def refused(error: Exception, param: str | None = None) -> ApiError:
    """What the library refuses, as a client is told it."""
    said = str(error).replace("max_new_tokens", "max_tokens")
    return ApiError(400, said, param=param)


def invalid(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's findings about a body, with the parameter's name and value."""
    first = found[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    forms = {error["msg"] for error in found if error["loc"][:2] == first["loc"][:2]}
    several = len(forms) > 1 and any(kind in place for kind in ("str", "bool"))  # none of the forms that it may have
    param = (place[0] if several else ".".join(place)) or None
    if first["type"] == "extra_forbidden":
        said = f"{param} is not a parameter that adi serves; leave it out"
        return ApiError(400, f"{said}.", param=param, code="unknown_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}.", code="invalid_json")
    what = "the body is" if param is None else f"{param} is"
    if first["type"] == "missing":
        return ApiError(400, f"{what} missing.", param=param, code="missing_required_parameter")
    said = ", or ".join(sorted(forms)) if several else first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{what} {first.get('input')!r:.60}: {said[:1].lower()}{said[1:].rstrip('.')}.", param=param)
