"""`Endpoint`: a server that is asked over HTTP, patiently, within a deadline, and believed no further than needed.

The standard library's client is used on purpose: it follows no redirect, takes no proxy or credentials from the
environment and reads through our own reader, so that a deadline holds for every byte.
"""

from __future__ import annotations

import email.utils
import errno
import io
import re
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from random import SystemRandom
from socket import gaierror, socket
from typing import Literal, TypeVar, cast
from urllib.parse import urlsplit

from reward.scorer import ScorerError
from reward.wire import (
    CONTENT_TYPE,
    Address,
    DeadlineReader,
    WireError,
    check_token,
    decode_error,
    parse_url,
    shorten,
)

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 15.0
"""Seconds: the pause doubles from try to try, and is drawn between a half and the whole of that."""
_random = SystemRandom()
"""Not the seeded generator of a run: pauses must not change what is sampled."""

Cause = Literal["status", "time-out", "connection", "unreachable", "cut off", "malformed", "refused"]
"""Why there is no answer: a status other than 200; not in time; the connection broke; nobody listens there; it broke
off amid the answer; the answer is not what it should be; it must not be followed (a redirect, a wrong certificate)."""


class NoAnswer(ScorerError):
    """A request that got no answer that will do.

    `reason`: what went wrong, without the address. `status` and `body` are the server's, where it answered with one.
    """

    def __init__(
        self, message: str, *, reason: str, cause: Cause, status: int | None = None, body: bytes = b""
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.cause: Cause = cause
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Dialect:
    """How a server speaks of what went wrong.

    `may_pass(status, body)`: whether the same request may succeed later. `said(body)`: the server's own line.
    """

    may_pass: Callable[[int, bytes], bool]
    said: Callable[[bytes], str]


SCORES = Dialect(may_pass=lambda status, _: status in {429, 502, 503, 504}, said=decode_error)
"""That of `reward.wire`."""


class _Failed(NoAnswer):
    """One try that failed. `later`: the next one may not; `pause`: seconds that the server asked for."""

    def __init__(
        self,
        reason: str,
        cause: Cause,
        *,
        later: bool = False,
        pause: float = 0.0,
        status: int | None = None,
        body: bytes = b"",
    ) -> None:
        super().__init__(reason, reason=reason, cause=cause, status=status, body=body)
        self.later = later
        self.pause = pause

    def said_as(self, message: str) -> NoAnswer:
        """The same for the caller, in its words."""
        return NoAnswer(message, reason=self.reason, cause=self.cause, status=self.status, body=self.body)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a server is, and how patiently it is asked.

    `timeout`: seconds for one try, from connecting to the last byte. `retries`: further tries after faults of the
    connection and the statuses of which the `dialect` says that they may pass. `deadline`: seconds for all tries of one
    request with the pauses between them. ScorerError when `url` cannot be used or would carry `token` in clear.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    timeout: float = 300.0
    deadline: float = 900.0
    retries: int = 5
    dialect: Dialect = field(default=SCORES, repr=False)

    def __post_init__(self) -> None:
        if self.token is not None:
            check_token(self.token, "the token", shortest=1)
        try:
            _ = self._address
        except ValueError as error:
            # Whoever puts a secret into a url puts it before an @ or behind a ?.
            shown = re.sub(r"//[^/]*@", "//", self.url.partition("?")[0])
            raise ScorerError(f"{shorten(repr(shown))} {error}") from error

    @property
    def host(self) -> str:
        """Name or number of the machine, without the port."""
        return self._address.host

    @cached_property
    def _address(self) -> Address:
        return parse_url(self.url, with_token=self.token is not None)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None,
        *,
        limit: int,
        read: Callable[[bytes], T],
        stopped: threading.Event | None = None,
    ) -> T:
        """What `read` makes of the answer, of at most `limit` bytes; NoAnswer when there is none that will do.

        `read` raises WireError for an answer that is not as it should be. Once `stopped` is set nothing is tried again.
        """
        where = f"{self.url}{path}"
        until = time.monotonic() + self.deadline
        tries = 0
        while True:
            tries += 1
            try:
                return read(self._try(method, path, body, limit=limit, until=until))
            except WireError as error:
                reason = self.hide(str(error))  # and no cause, which may quote what is hidden here
                raise NoAnswer(f"{where}: {reason}", reason=reason, cause="malformed") from None
            except _Failed as error:
                if not error.later:
                    raise error.said_as(f"{where}: {error}") from error
                longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (tries - 1))
                pause = max(error.pause, _random.uniform(longest / 2, longest))
                if tries > self.retries or time.monotonic() + pause >= until:
                    raise error.said_as(
                        f"{where}: no answer{f' in {tries} tries' if tries > 1 else ''} "
                        f"(retries={self.retries}, deadline={self.deadline:g} s): {error}"
                    ) from error
                time.sleep(pause)
                if stopped is not None and stopped.is_set():
                    raise error.said_as(f"{where}: stopped after {error}") from error

    def hide(self, text: str) -> str:
        """`text` without the token, which a server might send back to us."""
        return text if self.token is None else text.replace(self.token, "[token]")

    def _try(self, method: str, path: str, body: bytes | None, *, limit: int, until: float) -> bytes:
        seconds = min(self.timeout, until - time.monotonic())
        if seconds <= 0:
            raise _Failed("the deadline has passed", "time-out", later=True)
        connection = self._connection(seconds)
        try:
            return self._exchange(connection, method, path, body, limit=limit, until=time.monotonic() + seconds)
        except TimeoutError as error:
            raise _Failed(f"no whole answer within {seconds:.3g} s", "time-out", later=True) from error
        except ssl.SSLCertVerificationError as error:
            raise _Failed(f"its certificate is refused: {shorten(error.verify_message)}", "refused") from error
        except IncompleteRead as error:
            raise _Failed("the connection broke off amid the answer", "cut off", later=True) from error
        except OSError as error:
            reason = shorten(str(error)) or type(error).__name__
            raise _Failed(reason, "unreachable" if _nobody_there(error) else "connection", later=True) from error
        except (HTTPException, ValueError) as error:  # ValueError: a status or a chunk's length that is no number
            raise _Failed(f"the answer is not HTTP ({type(error).__name__})", "malformed") from error
        finally:
            connection.close()

    def _connection(self, seconds: float) -> HTTPConnection:
        where = self._address
        if where.secure:
            return HTTPSConnection(where.host, where.port, timeout=seconds, context=ssl.create_default_context())
        return HTTPConnection(where.host, where.port, timeout=seconds)

    def _exchange(
        self, connection: HTTPConnection, method: str, path: str, body: bytes | None, *, limit: int, until: float
    ) -> bytes:
        headers = {"Accept": CONTENT_TYPE, "Accept-Encoding": "identity", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = CONTENT_TYPE
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        connection.connect()
        # A server that refuses a request need not read it to the end; then its answer counts, not the broken pipe.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, self._address.path + path, body, headers)
        response = HTTPResponse(cast(socket, _UntilDeadline(connection.sock, until)), method=method)
        try:
            response.begin()
            return self._read(response, limit=limit)
        finally:
            response.close()

    def _read(self, response: HTTPResponse, *, limit: int) -> bytes:
        """The body of a 200 that is JSON and not over `limit`."""
        status = response.status
        if 300 <= status < 400:
            target = shorten(repr(self.hide(urlsplit(response.getheader("Location") or "").netloc)))
            raise _Failed(f"redirects are not followed (to {target}); give the final url", "refused")
        if status != 200:
            raise self._not_ok(response, limit)
        found = response.headers.get_content_type() if "Content-Type" in response.headers else "none"
        if found != CONTENT_TYPE or response.getheader("Content-Encoding", "identity") != "identity":
            found = shorten(repr(self.hide(found)))
            raise _Failed(f"expected plain {CONTENT_TYPE}, got content type {found}", "malformed")
        announced = response.length
        body = response.read(limit + 1)
        if len(body) > limit or (announced or 0) > limit:
            raise _Failed(f"the answer takes more than {limit} bytes", "malformed")
        if announced is not None and len(body) < announced:
            raise IncompleteRead(b"", announced - len(body))
        return body

    def _not_ok(self, response: HTTPResponse, limit: int) -> _Failed:
        """The status, and the server's own line, quoted, for it is not our text."""
        status, body = response.status, response.read(limit)
        if self.token is not None:
            body = body.replace(self.token.encode("ascii"), b"[token]")
        said = self.hide(self.dialect.said(body))
        reason = f"status {status}" + (f", {said!r}" if said else "")
        if not self.dialect.may_pass(status, body):
            return _Failed(reason, "status", status=status, body=body)
        pause = _retry_after(response.getheader("Retry-After"))
        reason += f", asks for {pause:.0f} s" if pause else ""
        return _Failed(reason, "status", later=True, pause=pause, status=status, body=body)


class _UntilDeadline:
    """As much of a socket as an HTTPResponse uses."""

    def __init__(self, connection: socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        del mode  # always "rb"
        return io.BufferedReader(DeadlineReader(self._connection, self._deadline))


def _nobody_there(error: OSError) -> bool:
    unreachable = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH}
    return isinstance(error, gaierror) or error.errno in unreachable


def _retry_after(header: str | None) -> float:
    """Seconds that a `Retry-After` asks for, as a number or a date; 0 when it says nothing that can be read."""
    if header is None:
        return 0.0
    if header.isascii() and header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
