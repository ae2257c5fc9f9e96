"""The loop: one page that reads as the algorithm (driver.py), and the workers that it directs (workers.py)."""
