"""What every room may use: files that survive a crash, safetensors headers, numbers as people read them. No torch."""
