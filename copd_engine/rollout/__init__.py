"""Rollout engines: who samples responses from an expert's current weights."""
