"""Reads the key=value pairs of --sglang, --megatron and --chat-template-kwargs."""

import difflib
import json

from common.errors import all_problems


@all_problems
def parse_overrides(pairs: tuple[str, ...], *, flag: str, fields: list[str] | None) -> dict:
    """Return ("key=value", ...) as {key: value}.

    A value that is JSON (true, 4, 0.1, null) is read as JSON, any other as text. fields: the names
    that may be set; None: any. Raises BadInput for another name, with the name nearest to it, and
    for a name that is given twice.
    """
    overrides, seen = {}, set()
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            yield f"{flag} {pair!r} is not of the form key=value"
        elif key in seen:
            yield f"{flag} {key} is given twice: give it once"
        elif fields is not None and key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            yield f"{flag} {key} is not a field that can be set there; the nearest is {nearest}"
        else:
            try:
                overrides[key] = json.loads(text)
            except json.JSONDecodeError:
                overrides[key] = text
            except (ValueError, RecursionError) as error:  # JSON, but too large or too deep
                yield f"{flag} {key} cannot be read as JSON ({error}): give another value"
        seen.add(key)
    return overrides
