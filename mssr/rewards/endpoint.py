"""JSON to a server and back, for judges and remote rewards: bounded in time, number and cost.

What may pass is tried again. A key comes from the environment alone, and goes to this address alone.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from mssr.config.secrets import is_secret_name
from mssr.errors import TrainingError, UserError

LARGEST_REPLY = 2**24
"""Bytes."""


class CallError(Exception):
    """There is no reply that could be used: the reason in one line."""

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused
        """Whether the key was refused, so that further requests make no sense."""


class Endpoint:
    """An address that takes and gives JSON by POST; may be used by several threads.

    Args:
        path: behind the address, left out of messages.
        key_variables: of the environment; the first that is set holds the key.
        time_limit_s: for one request with its reply.
        attempts: of a request that fails by what may pass: no connection, a time-out, a broken reply, status
            408, 409, 429 or 5xx.
        pause_s: before the second attempt; it doubles with each.
        max_requests: how often it may be asked, attempts included; None for any number.

    Raises:
        UserError: the address is none, or holds a secret: addresses are written and logged. Or the key is
            none.
    """

    def __init__(
        self,
        url: str,
        key_variables: Sequence[str],
        *,
        path: str = "",
        time_limit_s: float = 60.0,
        attempts: int = 3,
        pause_s: float = 1.0,
        max_requests: int | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"the address {url!r} does not begin with http:// or https://")
        parts = urllib.parse.urlsplit(url)
        if "@" in parts.netloc or any(is_secret_name(key) for key, _ in urllib.parse.parse_qsl(parts.query)):
            raise UserError(f"an address must not hold a password or key; set {' or '.join(key_variables)}")
        self.url, self._target, self.requests, self.closed = url, url + path, 0, threading.Event()
        self._time_limit_s, self._attempts, self._pause_s = time_limit_s, attempts, pause_s
        self._max, self._lock = max_requests, threading.Lock()
        name = next((name for name in key_variables if os.environ.get(name, "").strip()), "")
        self._key = os.environ.get(name, "").strip()
        if not re.fullmatch("[!-~]*", self._key):  # the complaint about such a header shows it
            raise UserError(f"the key in {name} holds a character that no key has")
        self._opener = urllib.request.build_opener(_NoRedirects())

    def post(self, body: Mapping[str, Any]) -> Any:
        """The reply to a request.

        Raises:
            CallError: there is none, or it is no JSON.
            TrainingError: as many requests were sent as may be.
        """
        data = json.dumps(body, default=str).encode()
        for attempt in range(self._attempts):
            if attempt:
                self.closed.wait(min(self._pause_s * 2 ** (attempt - 1), 30.0))
            if self.closed.is_set():
                raise CallError("it is no longer needed")
            self._count()
            try:
                return json.loads(self._reply(data))
            except urllib.error.HTTPError as error:
                problem = CallError(f"{self.url} answers with status {error.code}", error.code in (401, 403))
                error.close()
                if error.code not in (408, 409, 429) and error.code < 500:
                    break
            except (OSError, http.client.HTTPException) as error:
                problem = self.complaint(error)
            except ValueError as error:  # no JSON, or too much
                problem = self.complaint(error)
                break
        raise problem

    def complaint(self, error: Exception) -> CallError:
        """What it means that handling a reply raised this."""
        return CallError(f"{self.url}: {type(error).__name__}: {error}".splitlines()[0])

    def _count(self) -> None:
        with self._lock:
            if self._max is not None and self.requests >= self._max:
                raise TrainingError(
                    f"reward.server.max_requests={self._max}: {self.url} was asked as often as it may be; "
                    "a higher number goes on from the last checkpoint"
                )
            self.requests += 1

    def _reply(self, data: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._target, data, headers, method="POST")
        end = time.monotonic() + self._time_limit_s
        with self._opener.open(request, timeout=self._time_limit_s) as response:
            reply = b""
            while block := response.read1(65536):
                reply += block
                if time.monotonic() > end:  # the socket's own limit starts anew with every byte
                    raise TimeoutError("the reply took too long")
                if len(reply) > LARGEST_REPLY:
                    raise ValueError("the reply is too long")
        return reply


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None
