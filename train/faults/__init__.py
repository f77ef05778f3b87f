"""Events in a long run: preemption, lost ranks, numbers that are not finite, and how the run ends."""
