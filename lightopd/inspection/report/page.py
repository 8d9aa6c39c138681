"""The page of a report: template, style and script in one, and a policy that lets nothing else run."""

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

FOLDER = "page"


def render(facts: Mapping[str, Any], data: str, connect: str = "'none'") -> str:
    """The whole HTML file.

    Args:
        facts: what the template names, plain text that is escaped; charts come as drawings that were checked.
        data: base64, which holds no character that HTML or a script could take for its own.
        connect: where the script may ask for more; nowhere in a file, `'self'` when it is served.
    """
    script = _text("viewer.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action {connect}"
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_text("page.html.jinja"))
    groups = [Markup(render_group(group)) for group in facts["groups"]]
    own = {
        "groups": groups,
        "css": Markup(_text("page.css")),
        "script": Markup(script),
        "policy": policy,
        "data": data,
    }
    return template.render({**facts, **own})


def render_group(group: tuple[str, str, list[Any]]) -> str:
    """One section of charts alone, as it stands in the page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    anchor, name, charts = group
    return environment.from_string(_text("group.html.jinja")).render(anchor=anchor, name=name, charts=charts)


def drawing(svg: str) -> Markup:
    """A chart that `safe_svg` let through, as it is."""
    return Markup(svg)


def _text(name: str) -> str:
    return (files("lightopd.inspection.report") / FOLDER / name).read_text(encoding="utf-8")
