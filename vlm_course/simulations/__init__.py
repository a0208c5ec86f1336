"""The interactive figures of the course, one module for each, and the style that they share."""
