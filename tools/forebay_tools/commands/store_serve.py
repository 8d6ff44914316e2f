"""`forebay store serve`: run the store daemon until it is told to end."""

import argparse

from forebay_core.config import StoreSettings, load_settings
from forebay_tools.arguments import Commands, add_command, add_settings, given_settings


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "serve", run, "serve the volumes of a data folder")
    add_settings(parser, StoreSettings)


def run(arguments: argparse.Namespace) -> int:
    """Run the daemon in the foreground."""
    settings = load_settings(arguments.config, StoreSettings, given_settings(arguments, StoreSettings))
    from forebay_store.service.daemon import run as serve

    return serve(settings)
