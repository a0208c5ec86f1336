"""Procedural data with exact ground truth: what the course's own models are trained and measured on."""
