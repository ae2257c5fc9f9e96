"""Text conditions: each prompt is encoded once, and the result is kept on disk under a hash of its content."""
