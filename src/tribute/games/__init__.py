"""Cooperative games on coalitions of contributors: what to measure, and what it says about credit."""
