"""The handling of faults in a long run: preemption, lost ranks, non-finite numbers, and how processes end."""
