"""Optimizer states: where they are, which parameters they mirror, which saved state is whose."""
