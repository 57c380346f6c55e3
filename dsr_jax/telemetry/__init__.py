"""What a run tells about itself: metrics, progress, speed, FLOPs, traces."""
