"""The one exception that a user is meant to see."""


class UserError(Exception):
    """What is wrong with the user's input and how to mend it, in one line.

    The message names the field, its value and the fix. The command line prints it without a
    traceback and exits with code 2; inside a study it becomes the `reason` of a failed run.
    """
