"""How the embedded model was made: training its parts and measuring what it can do."""
