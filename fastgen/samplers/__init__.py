"""Noise schedules, solvers, guidance and the loop: every solver is a table that one kernel executes."""
