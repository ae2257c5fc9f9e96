"""What a run takes, before anything is downloaded: parameters, memory of each role, FLOPs, and whether it fits."""
