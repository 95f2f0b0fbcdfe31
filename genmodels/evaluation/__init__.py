"""Protocols, the evaluator, results and the leaderboard."""
