"""Names from files, made fit to be printed."""


def printable(text: str, keep: str = "\n\t") -> str:
    r"""The text with what is not printable escaped, but for what is kept: in a message line ends and tabs, in a name nothing.

    Names of files, tensors and rows come from strangers. An escape sequence in one would move the cursor of the terminal
    that a message about it is printed on, or change its title; a lone surrogate ends the print. "a\x1b[2J" becomes
    "a\\x1b[2J".
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
