"""The one exception that krony raises for input it can't use, and what others' errors say."""


class KronyError(ValueError):
    """Bad input. The message is one sentence: the thing, the numbers and the way out.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of another library's message, cut; its kind where it says nothing.

    A line that ends with a colon is only the head of what is said: the next ones belong to it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    for line in lines[1:]:
        if not text.endswith(":") or len(text) >= most:
            break
        text += f" {line}"
    return text[:most]
