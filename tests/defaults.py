"""A configuration file with nothing but the defaults, for tests that set every key on the command line."""

from configs import base


def get_config():
    """Returns the defaults."""
    return base.get_config()
