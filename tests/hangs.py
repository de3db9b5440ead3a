"""A test that hangs is named before pytest's own timer ends the process.

That timer prints the innermost hundred calls, and those of a test that traces or compiles do not reach the test.
"""

import os
import threading
from collections.abc import Generator

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key  # stderr as it was before pytest captured it

EARLY = 0.9  # of the timer's limit


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Names the test when nine tenths of the limit are over."""
    limit = float(item.config.getini("faulthandler_timeout") or 0)
    timer = threading.Timer(EARLY * limit, _tell, (item.config.stash[fault_handler_stderr_fd_key], item.nodeid, limit))
    timer.daemon = True
    if limit > 0:
        timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


def _tell(stderr: int, name: str, limit: float) -> None:
    os.write(stderr, f"\nStill running after {EARLY * limit:g} s, and ended after {limit:g}: {name}\n".encode())
