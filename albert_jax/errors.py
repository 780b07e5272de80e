"""The one exception that a person at the terminal is meant to read.

`UserError` carries a whole message: what was wrong, where, the value seen, and what to do.
The commands print it without a traceback and exit with 1 (see `albert_jax.cli`); everything
else that escapes is a fault of ours and keeps its traceback.
"""


class UserError(Exception):
    """Something the user can mend: a path, a flag, a config value, a line of their data."""
