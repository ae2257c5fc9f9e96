"""How the embedded model was made: training of its parts, and an assessment of the result."""
