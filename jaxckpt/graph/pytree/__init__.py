"""Pytrees of every kind: walking them, naming them, saying what each leaf is."""
