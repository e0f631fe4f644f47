"""Time, memory, bytes, and intervals."""
