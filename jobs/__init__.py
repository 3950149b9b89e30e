"""One entry per verb."""
