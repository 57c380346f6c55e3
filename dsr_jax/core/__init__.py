"""Leaf utilities that every other package may use: errors, types, random streams, trees, files."""
