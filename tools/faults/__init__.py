"""Fault injection into running commands, for tools/torture.py."""
