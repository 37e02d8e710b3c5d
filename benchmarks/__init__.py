"""Speed and memory of prefold against its peers, measured in one run."""
