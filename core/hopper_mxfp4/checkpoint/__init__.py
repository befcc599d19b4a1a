"""What a checkpoint holds: its family, its expert weights and their checks, its activation."""
