"""Training: configs, runs that resume, logs and exports."""
