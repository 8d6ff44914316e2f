"""`forebay cache serve`: run the cache daemon until it is told to end."""

import argparse

from forebay_core.config import CacheSettings, load_settings
from forebay_tools.arguments import Commands, add_command, add_settings, given_settings


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "serve", run, "serve volumes from a cache device")
    add_settings(parser, CacheSettings)


def run(arguments: argparse.Namespace) -> int:
    """Run the daemon in the foreground."""
    settings = load_settings(arguments.config, CacheSettings, given_settings(arguments, CacheSettings))
    from forebay_cache.service.daemon import run as serve

    return serve(settings)
