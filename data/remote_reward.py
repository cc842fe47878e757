"""A reward from a service: a sample as JSON in, a number out.

The service gets a POST with an object that has the fields of SENT. It answers with status 200 and a
number, or an object whose "reward" or "score" is one. --judges limits how many requests a rank has
open at a time, and --judge-timeout-s the time for one, all its tries included.
"""

import asyncio
import math
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import orjson

from common.errors import BadInput
from data.sample import Sample

SENT = ("prompt", "response", "label", "metadata", "source", "finish_reason", "group", "index")
TRIES = 4
FIRST_PAUSE_S = 0.5  # before the second try; each further pause is twice as long
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses of a service that may answer later
MOST_BYTES = 2**16  # of a service's answer
REACHED_WITHIN_S = 5.0


class RefusedByService(Exception):
    """The service has answered, and not with a reward. Its text has no part of the address."""

    def __init__(self, why: str, is_for_now: bool = False):
        super().__init__(why)
        self.is_for_now = is_for_now
        """Whether it may answer later."""


def is_url(name: str) -> bool:
    """Tell whether a reward's name is the address of a service."""
    return name.startswith(("http://", "https://"))


def remote_reward(url: str) -> Callable[[Sample], Awaitable[float]]:
    """Return a reward function that asks the service at this URL.

    It tries TRIES times where nobody answers or the service is overloaded. It raises
    aiohttp.ClientError, TimeoutError or RefusedByService where there is no reward.
    """
    import aiohttp  # here: it takes a quarter of a second, and every start imports this file

    async def ask(sample: Sample) -> float:
        body = orjson.dumps(
            {name: getattr(sample, name) for name in SENT}, option=orjson.OPT_NON_STR_KEYS
        )
        # A session belongs to an event loop. Each request has its own, so nothing is left open.
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
            for attempt in range(TRIES):
                try:
                    return await _ask_once(session, url, body)
                except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
                    if attempt == TRIES - 1:
                        raise
                except RefusedByService as error:
                    if not error.is_for_now or attempt == TRIES - 1:
                        raise
                await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)

    return ask


async def _ask_once(session, url: str, body: bytes) -> float:
    """Ask the service once. session: an aiohttp.ClientSession."""
    headers = {"Content-Type": "application/json"}
    async with session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
        if answer.status != 200:
            raise RefusedByService(f"status {answer.status}", answer.status in TRY_AGAIN)
        text = b""
        async for part in answer.content.iter_chunked(MOST_BYTES):
            text += part
            if len(text) > MOST_BYTES:
                raise RefusedByService(f"it answered with more than {MOST_BYTES} bytes")
    return _number(text)


def _number(text: bytes) -> float:
    """Return the reward in a service's answer. Raises RefusedByService where there is none."""
    shown = text[:200].decode(errors="replace")
    try:
        value = orjson.loads(text)
    except ValueError as error:
        raise RefusedByService(f"it answered with no JSON: {shown!r}") from error
    if isinstance(value, dict):
        value = value.get("reward", value.get("score"))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        rule = 'the answer must be a number, or an object with a number as "reward" or "score"'
        raise RefusedByService(f"it answered {shown!r}: {rule}")
    return float(value)


def url_problem(url: str) -> str:
    """Return why a text cannot be the address of a service; "" if it can."""
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_whole = False
    if is_whole and parts.password is not None:
        return "holds a password, and the run's record would show it: use a service without one"
    return "" if is_whole else f"{url} is no address such as http://127.0.0.1:8000/judge"


def check_listens(url: str, *, flag: str) -> None:
    """Raise BadInput where no service can be asked at this URL, because nobody listens there."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        socket.create_connection((parts.hostname, port), timeout=REACHED_WITHIN_S).close()
    except OSError as error:
        fix = "start the service first, or correct the address"
        raise BadInput(f"{flag} {url}: nobody answers there ({error}): {fix}") from error
