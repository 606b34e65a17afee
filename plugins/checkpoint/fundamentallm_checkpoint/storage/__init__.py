"""Checkpoint folders on disk: written durably, verified when they are read.

No module here knows the run, so all of it is safe in the thread that writes while the run trains.
"""
