"""Config: frozen sections whose fields are the flags. Standard library only."""
