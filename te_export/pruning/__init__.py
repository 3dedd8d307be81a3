"""Task graphs without the experts that a task hardly uses."""
