"""The one exception that a user is meant to see, and one that no library agrees on."""


class UserError(Exception):
    """What is wrong with the user's input and how to mend it, in one line.

    The message names the field, its value and the fix. The command line prints it without a
    traceback and exits with code 2; inside a study it becomes the `reason` of a failed run.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Text as it may be printed: one line, and no characters that steer a terminal.

    Messages quote what files hold, and a file may hold anything.
    """
    spaced = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in spaced)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's error and Arrow's, which is one; torch's and the system's tell it in words alone."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "allocate memory" in said
