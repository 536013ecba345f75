"""The one exception that the command line prints without a traceback."""


class UserError(ValueError):
    """Something that the user can change: the message says what was found, what was expected, and what to do."""
