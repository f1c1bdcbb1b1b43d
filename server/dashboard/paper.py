"""Pages that stand alone: one HTML file with its style, its script and its pictures, which asks nobody for anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from common.version import VERSION
from common.webpage.assets import PLOTLY, Assets, script_hash
from common.webpage.rendering import environment
from server.dashboard.figures import Figure
from server.run_folder import write_atomically

_BOOT = 'Charts.set(JSON.parse(document.getElementById("figures").textContent));'


def write_paper(path: Path, template: str, figures: Mapping[str, Figure], **values: Any) -> Path:
    """Writes a template of this package as a file of its own.

    Raises
    ------
    RunFolderError : it cannot be written.
    """
    templates: Environment = environment("server.dashboard")
    assets = Assets(["server.dashboard"])
    scripts = [assets[name].text.replace("</script", "<\\/script") for name in (PLOTLY, "charts.js")] + [_BOOT]
    text = templates.get_template(template).render(
        style=Markup(assets["page.css"].text),
        scripts=[Markup(script) for script in scripts],
        hashes=Markup(" ".join(map(script_hash, scripts))),
        figures=Markup(json.dumps(figures, separators=(",", ":")).replace("<", "\\u003c")),
        wardround=VERSION,
        **values,
    )
    write_atomically(path, text, durable=False)
    return path
