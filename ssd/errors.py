"""The one exception that is a user's to mend."""


class UserError(ValueError):
    """A setting, file or command that cannot work: what was given, what was expected, what to do.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


class BrokenSample(Exception):
    """A sample that cannot be read; the message says why. Data counts it and goes on with another."""
