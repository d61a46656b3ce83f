"""Scores: cones to probabilities, calibration, novelty, triage."""
