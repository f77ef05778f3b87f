"""The page that shows runs side by side: the list of panels, and the HTML drawn from it."""
