"""Names of an audit log's files, for whoever only looks at them. Imports nothing that takes time."""

from __future__ import annotations

from typing import Final

LOG: Final = "audit.log"
HEAD: Final = "audit.head"
