"""Finding the gates of a traced module by what they compute."""
