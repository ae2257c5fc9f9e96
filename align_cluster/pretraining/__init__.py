"""Makes the embedded model: trains its parts, and assesses the result."""
