"""What a long run meets: preemption, lost ranks, bad numbers, and how it ends."""
