"""The page of an audit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adi.files import write_text
from adi.measure.pages import render


def audit_page(report: Mapping[str, Any]) -> str:
    """The whole page as HTML text."""
    verdict = "passed" if report["passed"] else f"{len(report['violations'])} violations"
    return render("audit.html", title=f"Audit of {report['model']}: {verdict}", report=report)


def write_audit(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all."""
    write_text(Path(path), audit_page(report))
