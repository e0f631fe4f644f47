"""Text to calibrate on, and text to be judged by, which never mix."""

from foveate.data.text import Text, load_text, tokens

__all__ = ["Text", "load_text", "tokens"]
