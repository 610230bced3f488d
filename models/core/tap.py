"""What a hook looks at, so that attention need not leave its fused path for one that does not ask for it."""

from attn import Hook


def sees_probabilities(hook: Hook | None) -> bool:
    """Whether a hook may look at `"logits"` or `"probs"`, which a fused path does not have.

    A hook that looks at some sites only says which by an attribute `sites`; one without it may look at all.
    """
    if hook is None:
        return False
    sites = getattr(hook, "sites", None)
    return sites is None or not {"logits", "probs"}.isdisjoint(sites)
