"""Precision variants: the verified fp32 graphs again, with smaller weights, each judged task by task."""
