"""Finding the gates of a traced module by what they compute, and writing their sums in one form."""
