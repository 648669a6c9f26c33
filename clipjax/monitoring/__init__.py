"""Monitoring: metric files, the progress line, the record of a run's starts, slow processes."""
