"""Experiments: all settings of a run, checked before anything is compiled."""
