"""What every folder may use: errors, settings, processes, process groups, time."""
