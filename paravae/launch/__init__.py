"""The commands. Process groups are made and torn down here only."""
