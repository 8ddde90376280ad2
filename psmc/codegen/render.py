"""The one place that runs jinja2: our own templates over data, never a user's text as a template."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound

from psmc import assets


class _Assets(BaseLoader):
    def get_source(self, environment: Environment, template: str) -> tuple[str, str | None, Any]:
        try:
            return assets.text("templates", template), template, lambda: True
        except (FileNotFoundError, ValueError) as error:
            raise TemplateNotFound(template) from error


@cache
def _environment() -> Environment:
    return Environment(
        loader=_Assets(), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        autoescape=False,
    )  # fmt: skip


def render(template: str, **values: object) -> str:
    """The template's text. Raises jinja2.UndefinedError if it reads what was not given."""
    return _environment().get_template(template).render(**values)
