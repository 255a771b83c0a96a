"""JSON carried inside the page: safe to stand between script tags, whatever the texts hold."""

import json
import re
from typing import Any

from markupsafe import Markup

# "<" ends the element or opens a comment; U+2028 and U+2029 end lines in old scripts; lone
# surrogates have no UTF-8.
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def carried_json(value: Any) -> Markup:
    """Return ``value`` as JSON that cannot leave a ``<script type="application/json">``.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def carried_size(value: Any) -> int:
    """Return the bytes that ``value`` takes in the page."""
    return len(carried_json(value).encode())
