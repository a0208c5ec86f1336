"""The real models that the course names, as data with sources."""
