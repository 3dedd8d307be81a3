"""A scheduler for apps in which several callers ask for several tasks at once; read scheduler.py first."""
