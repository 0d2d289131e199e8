"""How far a computed tensor is from the truth."""


def norm_error(value, truth):
    """Relative, of the 2-norm; infinite where the truth is 0 and the value is not."""
    if not truth.any():
        return float("inf") if value.any() else 0.0
    return float((value.double() - truth).norm() / truth.norm())


def largest_error(value, truth):
    """Largest elementwise relative error; of gradients and weights use the norm instead."""
    return float(((value.double() - truth).abs() / truth.abs().clamp(min=1e-30)).max())
