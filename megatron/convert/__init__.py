"""Models of other systems: their files become checkpoints of this one, and the other way round."""
