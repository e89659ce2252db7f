"""What every room stands on: errors, paths, progress, statistics, clocks."""
