"""The one exception class for mistakes a user can mend."""


class UserError(ValueError):
    """A mistake in the configuration, the data or the machine set-up: says the value, the rule and the remedy.

    `expert_iteration.cli` prints it without a traceback and exits with code 1.
    """
