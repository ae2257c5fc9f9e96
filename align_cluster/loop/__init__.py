"""The loop: one page that reads as the algorithm (driver.py) and the crew of workers that it directs (crew.py)."""
