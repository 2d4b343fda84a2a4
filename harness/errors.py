"""What a user can mend: `cli.run` prints it as one line. Any other exception is a bug and keeps its traceback."""


class UserError(ValueError):
    """Says what is wrong with flags, files or data, and what to do; ends a script with status 2."""
