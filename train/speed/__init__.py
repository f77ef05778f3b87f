"""How fast a run is: measured, profiled, and made faster."""
