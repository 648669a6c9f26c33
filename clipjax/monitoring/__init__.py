"""What a run tells: metric files, the progress line, the record of its starts, slow processes."""
