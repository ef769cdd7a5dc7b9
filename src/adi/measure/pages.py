"""Self-contained HTML pages from the Jinja templates in ``adi/data``; every value is escaped."""

from __future__ import annotations

from typing import Any


def render(template: str, **values: Any) -> str:
    """The page of a template. ``tojson`` gives JSON that may be inside a script element: ASCII, without ``<``, ``>``, ``&``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("adi", "data"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["figure"] = _figure
    return environment.get_template(template).render(values)


def _figure(value: float | None, form: str, times: float = 1) -> str:
    """A number in this format, nothing for None."""
    return "" if value is None else form % (times * value)
