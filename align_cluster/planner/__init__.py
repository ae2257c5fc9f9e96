"""Plans a run before anything is downloaded: parameters, memory of each worker, FLOPs, and whether it fits."""
