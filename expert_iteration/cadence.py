"""When something periodic is due."""


def is_due(step: int, every: int | None, since: int | None = None) -> bool:
    """Whether something that happens every `every` gradient steps is due at `step`.

    Args:
        step: gradient steps so far.
        every: the period; None or 0 means never.
        since: the last step at which the question was asked, by default the one before. What must fall on an optimizer
            step asks only there, with the gradient step of the previous optimizer step: what fell due between the two
            happens now, once.
    """
    if not every:
        return False
    since = step - 1 if since is None else since
    return step // every > since // every
