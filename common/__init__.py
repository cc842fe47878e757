"""What every folder may use: settings, errors, processes, process groups, time."""
