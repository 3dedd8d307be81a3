"""What is changed in a traced program, exactly, before it is captured as a graph."""
