"""What a run says about itself: one HTML page, one terminal table. Reads the run folder and nothing else."""
