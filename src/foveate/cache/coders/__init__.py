"""Coders: how many bits an entry takes."""
