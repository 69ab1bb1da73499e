"""The one exception that krony raises for input it can't use."""


class KronyError(ValueError):
    """Bad input. The message is one sentence: the thing, the numbers and the way out.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2
