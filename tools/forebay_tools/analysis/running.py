"""Asking a running cache daemon for its sample of accesses."""

import argparse
import asyncio

from forebay_tools.connect import ask_cache
from forebay_wire.messages import GetSample, Sample


def ask_sample(arguments: argparse.Namespace) -> tuple[Sample, memoryview]:
    """Return what the daemon of --run-dir answers: the sample, and its keys.

    Raises:
        ForebayError: no daemon answers, or one that knows nothing of it.
    """
    return asyncio.run(ask_cache(arguments, GetSample(), Sample))
