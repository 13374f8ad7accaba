"""What libraries may print: nothing on stdout, which belongs to results."""

from __future__ import annotations

import logging
import sys

import pytest

from tuoling import environment


def test_deepspeed_says_errors_on_stderr_and_nothing_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """Its logger has a handler for stdout from the moment it is imported."""
    environment.quiet_libraries()
    logger, handler = logging.getLogger("DeepSpeed"), logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    try:
        logger.info("Setting ds_accelerator to cpu")
        logger.warning("no GPU was found")
        logger.error("the launcher failed")
    finally:
        logger.removeHandler(handler)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "the launcher failed\n"
