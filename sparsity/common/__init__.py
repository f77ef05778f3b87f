"""Helpers that all packages may use: files that survive a crash, safetensors headers, numbers as text. No torch."""
